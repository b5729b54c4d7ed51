"""Small steps counted by hand, and what is refused."""

import gc
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from jaxptis.cluster import Cluster, DeviceSpec, Link
from jaxptis.performance import (
    Costs,
    LayerCost,
    Span,
    TransferSpan,
    roofline_s,
    simulate,
)
from jaxptis.performance.collector import collector_paused
from jaxptis.plan import Plan, Task
from tests.clusters import device, equal_devices
from tests.small_plans import layer_costs, named_plan

TWO = Plan.parse(
    "jaxptis plan 1\n"
    "stage 0 on device 0\n  a\n  b\nstage 1 on device 1\n  c\n"
    "device 0: 0F0 0F1 0B0 0B1\ndevice 1: 1F0 1I0 1F1 1W0 1I1 1W1\n"
)
COSTS = Costs(
    (
        LayerCost(name="a", forward_s=1, backward_s=8, input_grad_s=99, weight_grad_s=99),
        LayerCost(name="b", forward_s=1, backward_s=8, input_grad_s=99, weight_grad_s=99),
        LayerCost(
            name="c",
            forward_s=2,
            backward_s=99,
            input_grad_s=2,
            weight_grad_s=4,
            recompute_s=1,
            input_bytes=12,
        ),
    )
)


def spans(text: str) -> tuple[Span, ...]:
    """Read `task start end` by commas."""
    words = (each.split() for each in text.split(","))
    return tuple(Span(Task.parse(task), float(a), float(b)) for task, a, b in words)


def transfers(text: str) -> tuple[TransferSpan, ...]:
    """Read `source target task reader start end` by commas, each of 12 bytes."""
    words = (each.split() for each in text.split(","))
    return tuple(
        TransferSpan(int(s), int(t), Task.parse(task), int(reader), float(a), float(b), 12)
        for s, t, task, reader, a, b in words
    )


def test_devices_and_links_that_take_no_time() -> None:
    """The gradient leaves after I, and B's own figure plays no part where a backward is split."""
    timeline = simulate(TWO, COSTS)
    assert timeline.spans == (
        spans("0F0 0 2, 0F1 2 4, 0B0 6 22, 0B1 22 38"),
        spans("1F0 2 4, 1I0 4 6, 1F1 6 8, 1W0 8 12, 1I1 12 14, 1W1 14 18"),
    )
    assert timeline.transfers == transfers("0 1 0F0 1 2 2, 0 1 0F1 1 4 4, 1 0 1I0 0 6 6") + (
        transfers("1 0 1I1 0 14 14")
    )
    assert (timeline.step_s, timeline.busy_s) == (38, (36, 16))
    assert timeline.bubble == pytest.approx((2 / 38, 22 / 38))


def test_a_link_carries_one_transfer_at_a_time() -> None:
    """12 bytes at 4 a second after a latency of 1; the way back is free and twice as fast."""
    cluster = Cluster(
        (device(),) * 2,
        Link(latency_s=1, bytes_per_s=4),
        links={(1, 0): Link(bytes_per_s=6)},
    )
    timeline = simulate(TWO, COSTS, cluster)
    assert timeline.transfers == transfers(
        "0 1 0F0 1 2 6, 0 1 0F1 1 6 10, 1 0 1I0 0 10 12, 1 0 1I1 0 18 20"
    )
    assert timeline.spans == (
        spans("0F0 0 2, 0F1 2 4, 0B0 12 28, 0B1 28 44"),
        spans("1F0 6 8, 1I0 8 10, 1F1 10 12, 1W0 12 16, 1I1 16 18, 1W1 18 22"),
    )


def test_blocking_transfers() -> None:
    """Each takes 3 s of both devices; 1W1 need not wait for the last, which waits for 0B0."""
    timeline = simulate(TWO, COSTS, equal_devices(2, bytes_per_s=4), blocking=True)
    assert timeline.transfers == transfers(
        "0 1 0F0 1 2 5, 0 1 0F1 1 7 10, 1 0 1I0 0 12 15, 1 0 1I1 0 31 34"
    )
    assert timeline.spans == (
        spans("0F0 0 2, 0F1 5 7, 0B0 15 31, 0B1 34 50"),
        spans("1F0 5 7, 1I0 10 12, 1F1 15 17, 1W0 17 21, 1I1 21 23, 1W1 23 27"),
    )


def test_what_goes_back_and_forth_goes_together() -> None:
    """The third forward and the second backward end at one time; the longer way counts."""
    plan = named_plan("1f1b", 2, 3)
    costs = layer_costs(plan, lambda *_: 1)
    links = {(0, 1): Link(latency_s=3), (1, 0): Link(latency_s=5)}
    timeline = simulate(plan, costs, Cluster((device(),) * 2, links=links), blocking=True)
    assert timeline.spans == (
        spans("0F0 0 1, 0F1 4 5, 0B0 15 17, 0F2 17 18, 0B1 23 25, 0B2 31 33"),
        spans("1F0 4 5, 1B0 8 10, 1F1 15 16, 1B1 16 18, 1F2 23 24, 1B2 24 26"),
    )
    together = [each for each in timeline.transfers if each.start_s == 18]
    assert {(str(each.made_by), each.end_s) for each in together} == {("0F2", 23), ("1B1", 23)}


def test_devices_of_different_speed() -> None:
    """The second device takes twice as long; what starts a program is part of a task."""
    cluster = Cluster((device(), device(speed=0.5), device()))
    timeline = simulate(TWO, replace(COSTS, start_s=1), cluster)
    assert timeline.spans == (
        spans("0F0 0 3, 0F1 3 6, 0B0 15 32, 0B1 37 54"),
        spans("1F0 3 9, 1I0 9 15, 1F1 15 21, 1W0 21 31, 1I1 31 37, 1W1 37 47"),
    )


def test_a_stage_that_recomputes_takes_longer() -> None:
    first, second = TWO.stages
    plan = replace(TWO, stages=(first, replace(second, recompute="all")))
    assert simulate(plan, COSTS).spans[1] == spans(
        "1F0 2 4, 1I0 4 7, 1F1 7 9, 1W0 9 13, 1I1 13 16, 1W1 16 20"
    )


def test_text() -> None:
    plan = named_plan("gpipe", 2, 1)
    assert simulate(plan, layer_costs(plan, lambda *_: 1)).text() == (
        "step 6000.000 ms\n"
        "\n"
        "device 0: busy 3000.000 ms, bubble 50.0%\n"
        "         0.000     1000.000  0F0\n"
        "      4000.000     6000.000  0B0\n"
        "\n"
        "device 1: busy 3000.000 ms, bubble 50.0%\n"
        "      1000.000     2000.000  1F0\n"
        "      2000.000     4000.000  1B0\n"
    )


@pytest.mark.parametrize("blocking", [False, True])
def test_one_device_has_no_bubble_and_no_transfer(blocking: bool) -> None:
    plan = Plan.parse(
        "jaxptis plan 1\nstage 0 on device 0\n  a\nstage 1 on device 0\n  b\n"
        "device 0: 0F0 1F0 1B0 0B0\ndevice 1:\n"
    )
    costs, cluster = layer_costs(plan, lambda *_: 1), equal_devices(2, latency_s=9)
    timeline = simulate(plan, costs, cluster, blocking=blocking)
    assert (timeline.step_s, timeline.bubble) == (6.0, (0.0, 1.0))
    assert timeline.transfers == ()


@pytest.mark.parametrize("blocking", [False, True])
def test_nothing_takes_no_time(blocking: bool) -> None:
    plan = named_plan("1f1b", 2, 2)
    timeline = simulate(plan, layer_costs(plan, lambda *_: 0), blocking=blocking)
    assert (timeline.step_s, timeline.bubble) == (0.0, (0.0, 0.0))
    assert [len(curve.times_s) for curve in timeline.memory] == [1, 1]


@pytest.mark.parametrize("was_on", [False, True])
def test_the_collector_is_left_as_it_was(was_on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(KeyError), collector_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()


def test_costs_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"layer 2 is 'c' in the plan \(3 layers\) and None in"):
        simulate(TWO, Costs(COSTS.layers[:2]))
    with pytest.raises(ValueError, match=r"layer 0 is 'a' in the plan .* and 'c' in the costs"):
        simulate(TWO, Costs(COSTS.layers[::-1]))


def test_a_cluster_of_fewer_devices() -> None:
    with pytest.raises(ValueError, match=r"the plan has 2 devices, but the cluster 1; describe"):
        simulate(TWO, COSTS, equal_devices(1))


def test_a_task_costs_what_its_layers_do() -> None:
    layers = (
        LayerCost(name=name, forward_s=f, backward_s=b, input_grad_s=i, weight_grad_s=w)
        for name, f, b, i, w in (("a", 1, 8, 64, 512), ("b", 2, 16, 128, 1024))
    )
    costs = Costs(tuple(layers))
    assert [costs.task_s(range(2), kind) for kind in "FBIW"] == [3, 24, 192, 1536]
    assert [costs.task_s(range(1, 2), kind) for kind in "FBIW"] == [2, 16, 128, 1024]
    with pytest.raises(ValueError, match="task kind 'X' is not known; use one of F, B, I, W"):
        costs.task_s(range(1), "X")


@pytest.mark.parametrize("what", ["forward_s", "backward_s", "input_grad_s", "weight_grad_s"])
@pytest.mark.parametrize("seconds", [-1.0, inf, nan])
def test_bad_layer_cost(what: str, seconds: float) -> None:
    given: dict[str, Any] = dict.fromkeys(
        ("forward_s", "backward_s", "input_grad_s", "weight_grad_s"), 1.0
    )
    with pytest.raises(ValueError, match=f"{what} of layer 'mlp' is {seconds}; use finite"):
        LayerCost(name="mlp", **{**given, what: seconds})


def test_roofline() -> None:
    spec = DeviceSpec(kind="x", flops_per_s=100.0, bytes_per_s=10.0)
    assert roofline_s(1000.0, 10.0, spec) == 10.0  # bound by compute
    assert roofline_s(100.0, 50.0, spec) == 5.0  # bound by memory
    assert roofline_s(0.0, 0.0, spec) == 0.0
