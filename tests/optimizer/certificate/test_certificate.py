"""What is proven of every plan, beside every schedule of small cases, and random plans of any."""

import json
import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from experiments.published import DATA, TICK_S
from jaxptis.cluster import Cluster
from jaxptis.optimizer.certificate import certify
from jaxptis.optimizer.certificate.least_memory import check_possible, enough_bytes
from jaxptis.performance import Costs, LayerCost, TiedParams, simulate
from tests.clusters import device, equal_devices
from tests.optimizer.every_schedule import shortest_s
from tests.optimizer.tiny_cases import tiny_case
from tests.performance.random_steps import Step, random_step
from tests.published import PublishedPlan, published_costs, published_plans

NUM_STEPS = 30

ROUNDING = 1 + 1e-9


def test_no_schedule_of_a_small_case_is_shorter(num_tiny_cases: int) -> None:
    """And of many the shortest is as long as the bound."""
    counts: Counter[str] = Counter()
    for seed in range(num_tiny_cases):
        costs, cluster, num_microbatches = tiny_case(seed)
        bound_s = certify(costs, cluster, num_microbatches).bound_s
        shortest, sure = shortest_s(costs, cluster, num_microbatches, math.inf, max_nodes=50_000)
        assert bound_s <= shortest * ROUNDING, seed
        counts["sure"] += sure
        counts["tight"] += sure and shortest <= bound_s * (1 + 1e-4)
    print(counts)
    assert counts["sure"] > 0.8 * num_tiny_cases
    assert counts["tight"] > 0.3 * num_tiny_cases


def trained_step(rng: Random) -> Step:
    """Return a random step with backwards; a layer that recomputes nothing saves no less."""
    while True:
        step = random_step(rng)
        if any(task.kind != "F" for row in step.plan.schedule for task in row):
            layers = (
                replace(x, saved_all_bytes=max(x.saved_bytes, x.saved_all_bytes))
                for x in step.costs.layers
            )
            return replace(step, costs=replace(step.costs, layers=tuple(layers)))


@pytest.mark.parametrize("blocking", [False, True])
def test_no_random_plan_is_shorter(blocking: bool) -> None:
    """With transfers, recomputation, devices of any speed, and no more memory than they need."""
    for seed in range(NUM_STEPS):
        step = trained_step(Random(seed))
        plan, costs = step.plan, step.costs
        timeline = simulate(plan, costs, step.cluster, blocking=blocking)
        devices = (
            replace(spec, memory_bytes=max(1, curve.peak_bytes))
            for spec, curve in zip(step.cluster.devices, timeline.memory, strict=False)
        )
        cluster = Cluster((*devices,), step.cluster.link, step.cluster.links)
        certificate = certify(costs, cluster, plan.num_microbatches)
        assert certificate.bound_s <= timeline.step_s * ROUNDING, seed


TUNED = [p for p in published_plans("tuned") if p.num_microbatches == 2 * p.num_devices]


@pytest.mark.parametrize("published", TUNED, ids=str)
def test_published_plans(published: PublishedPlan) -> None:
    num_devices, num_microbatches = published.num_devices, published.num_microbatches
    certificate = certify(
        published_costs(published.model), equal_devices(num_devices), num_microbatches
    )
    print(f"gap of what their planner found: {certificate.gap(published.makespan_s):.2%}")
    assert certificate.bound_s <= published.makespan_s


def test_a_head_that_cannot_be_cut() -> None:
    """The forwards before it, all of it but the weight gradients, the input gradients before it."""
    profile = json.loads((DATA / "layer_profiles.json").read_text())["nemotron-nano-v2-9B"]
    ticks = {
        kind: [round(milliseconds * 1e-3 / TICK_S) for milliseconds in row]
        for kind, row in profile["milliseconds"].items()
    }
    *before, head = profile["layers"].split()
    total = sum(ticks[kind][0] + ticks[kind][1] for kind in before) + 32 * sum(ticks[head][:2])
    certificate = certify(published_costs("nemotron-nano-v2-9B"), equal_devices(16), 32)
    assert certificate.bound_s == pytest.approx(total * TICK_S)
    assert "'57/head' cannot be cut" in certificate.bounds[0].binds


@pytest.mark.parametrize("model", ["llama3-8B", "llama3-32B", "llama3-80B"])
@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(4, 8), (4, 16), (8, 32)])
def test_whole_layers(model: str, num_devices: int, num_microbatches: int) -> None:
    """If n layers are with the head, another device has its share of the rest, rounded up.

    And all devices but that of the first layer begin after its forward.
    """
    costs, M = published_costs(model), num_microbatches
    first, *_, body, head = (x.forward_s + x.backward_s for x in costs.layers)
    waits_s = costs.layers[0].forward_s
    num_layers = len(costs.layers) - 2

    def shared_s(num: int, num_devices: int) -> float:
        return waits_s + M * -(-num // num_devices) * body if num else 0.0

    on_two_s = [
        max(
            waits_s + M * (head + n * body),
            M * (first + k * body),
            shared_s(num_layers - n - k, num_devices - 2),
        )
        for n in range(num_layers + 1)
        for k in range(num_layers - n + 1)
    ]
    on_one_s = [
        max(M * (first + head + n * body), shared_s(num_layers - n, num_devices - 1))
        for n in range(num_layers + 1)
    ]
    certificate = certify(costs, equal_devices(num_devices), M)
    packed_s = min(on_two_s + on_one_s)
    assert certificate.bound_s >= packed_s * (1 - 1e-5)  # to which it is sought
    assert "whole layers" in certificate.bounds[0].binds


def test_few_microbatches_keep_few_devices_busy() -> None:
    """Four layers on four devices, two microbatches: 24 seconds of work, and idle time.

    The second device begins after a second. The others do when one microbatch is through all four
    forwards, as two microbatches are on two devices until then.
    """
    layer = LayerCost(name="", forward_s=1.0, backward_s=2.0, input_grad_s=1.0, weight_grad_s=1.0)
    costs = Costs(tuple(replace(layer, name=name) for name in "abcd"))
    certificate = certify(costs, equal_devices(4), 2)
    (work,) = (bound for bound in certificate.bounds if "the work of all layers" in bound.binds)
    assert work.seconds == pytest.approx((24 + 1 + 4 + 4) / 4)


def test_memory_that_holds_few_microbatches() -> None:
    """Four equal layers on two devices: what a layer saves stays 8, 6, 4 or 2 seconds.

    For 100 microbatches of 3 bytes that is 6000 byte seconds, 1000 seconds of 6 bytes. Of the first
    layer recomputed, that is 400 less, and the work of 600 seconds is 5000 more; a part x does both
    where 1000 - 400 x = 600 + 5000 x.
    """
    layer = LayerCost(
        name="", forward_s=1.0, backward_s=2.0, input_grad_s=1.0, weight_grad_s=1.0, recompute_s=100
    )
    layer = replace(layer, saved_bytes=3, saved_all_bytes=3)
    costs = Costs(tuple(replace(layer, name=name) for name in "abcd"))
    certificate = certify(costs, Cluster((device(memory_bytes=3),) * 2), 100)
    assert certificate.bound_s == pytest.approx(600 + 5000 * 400 / 5400)
    assert certificate.bounds[0].binds == "the memory of 2 devices for what microbatches save"


def heavy(**num_bytes: int) -> Costs:
    """Return seven layers, each a second or two a task, of these bytes."""
    layer = LayerCost(
        name="", forward_s=1.0, backward_s=2.0, input_grad_s=1.0, weight_grad_s=1.0, **num_bytes
    )
    return Costs(tuple(replace(layer, name=f"layer{index}") for index in range(7)))


def test_what_whole_layers_need() -> None:
    """Seven layers of 10 bytes on three devices: one has three of them, and 5 for a backward."""
    costs = heavy(param_bytes=10, saved_bytes=5, saved_all_bytes=5)
    with pytest.raises(ValueError, match="whole layers do not fit; no plan needs less than 35 b"):
        check_possible(costs, Cluster((device(memory_bytes=34),) * 3))
    check_possible(costs, Cluster((device(memory_bytes=35),) * 3))
    with pytest.raises(ValueError, match=r"need 70 bytes.* up to 5; the devices have 60, "):
        check_possible(costs, Cluster((device(memory_bytes=20),) * 3))


def test_a_layer_that_is_too_large() -> None:
    held = {"param_bytes": 10, "grad_bytes": 10, "state_bytes": 20}
    costs = heavy(**held, saved_bytes=5, saved_all_bytes=5)
    with pytest.raises(
        ValueError,
        match="layer 'layer0' alone needs 45 bytes on its device: 40 for parameters, gradients and "
        "optimizer state, 5 while its backward runs; device 1, which has the most, has 42, and "
        "lacks 3; ",
    ):
        check_possible(costs, Cluster((device(memory_bytes=41), device(memory_bytes=42))))


def test_tied_parameters_are_on_each_of_their_devices() -> None:
    """On one device once; the last layer and the first on two devices need them twice."""
    tied = TiedParams(layers=("layer0", "layer6"), param_bytes=100, grad_bytes=0)
    costs = replace(heavy(param_bytes=10), tied=(tied,))
    check_possible(costs, Cluster((device(memory_bytes=130), device(memory_bytes=40))))
    with pytest.raises(ValueError, match="no plan fits"):
        check_possible(costs, Cluster((device(memory_bytes=129), device(memory_bytes=40))))


def test_what_is_said_to_be_enough_is() -> None:
    for seed in range(50):
        step = trained_step(Random(seed))
        num_bytes = max(1, enough_bytes(step.costs, 2))
        check_possible(step.costs, Cluster((device(memory_bytes=num_bytes),) * 2))


def test_the_text_says_what_binds() -> None:
    certificate = certify(published_costs("llama3-8B"), equal_devices(4), 8)
    first, second, *_ = certificate.text(1.1 * certificate.bound_s).splitlines()
    assert "at most 10.00% longer than that of any plan" in first
    assert second == f"{certificate.bound_s * 1e3:12.3f} ms: {certificate.bounds[0].binds}"
