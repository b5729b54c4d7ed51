"""Candidates and their list schedules, beside the simulator that knows nothing of them."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from jaxptis.cluster import Cluster, Link
from jaxptis.optimizer.search.anneal import step_s_of
from jaxptis.optimizer.search.best import to_plan
from jaxptis.optimizer.search.polish import order_of
from jaxptis.optimizer.steps.candidate import (
    CUT,
    HOME,
    NUM_COLUMNS,
    RECOMPUTE,
    WHOLE,
    WINDOW,
    Candidate,
    least_s,
    make_stages,
)
from jaxptis.optimizer.steps.list_kernel import Rule, list_step_s
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import Costs, LayerCost, TiedParams, simulate
from tests.clusters import device

NO_ORDER = np.empty((0, 3), np.int64)


def _case(seed: int, *, memory_bytes: int | None = None) -> tuple[Costs, Cluster, Candidate, int]:
    """Draw layers, devices, a candidate and a number of microbatches."""
    random = Random(seed)
    num_layers, num_devices = random.randint(3, 9), random.randint(1, 3)
    costs = Costs(
        tuple(
            LayerCost(
                name=f"layer{index}",
                forward_s=random.randint(1, 9),
                backward_s=random.randint(5, 15),
                input_grad_s=random.randint(index > 0, 9) * (index > 0 or random.random() < 0.5),
                weight_grad_s=random.randint(0, 5),
                recompute_s=random.randint(0, 9),
                input_bytes=random.randint(0, 5) * (index > 0 and memory_bytes is None),
                skipping_bytes=random.randint(0, 2) * (index > 0 and memory_bytes is None),
                saved_bytes=random.randint(0, 5),
                kept_bytes=random.randint(0, 9) if memory_bytes else 0,
            )
            for index in range(num_layers)
        ),
        start_s=random.randint(0, 1),
    )
    devices = (
        device(speed=random.choice([0.5, 1.0]), memory_bytes=memory_bytes)
        for _ in range(num_devices)
    )
    num_microbatches = random.randint(1, 5)
    layers = np.zeros((num_layers, NUM_COLUMNS), np.int64)
    layers[:, HOME] = random.choices(range(num_devices), k=num_layers)
    layers[:, WINDOW] = random.choices(range(1, num_microbatches + 1), k=num_layers)
    for column in CUT, WHOLE, RECOMPUTE:
        layers[:, column] = random.choices([0, 1], k=num_layers)
    stretch = random.choice([0.0, 4 * random.random()])
    rule = Rule(random.random() < 0.5, random.randint(0, 2), random.randint(0, 2), 0.0, stretch)
    return costs, Cluster(tuple(devices)), Candidate(layers, rule), num_microbatches


@pytest.mark.parametrize("seed", range(200))
def test_a_step_takes_what_the_simulator_says(seed: int) -> None:
    costs, cluster, candidate, num_microbatches = _case(seed)
    problem = Problem.of(costs, cluster, num_microbatches)
    step_s, _ = step_s_of(problem, candidate, np.inf, NO_ORDER)
    plan = to_plan(
        problem, order_of(problem, candidate), [layer.name for layer in costs.layers]
    )  # is checked
    assert step_s == pytest.approx(simulate(plan, costs, cluster).step_s, rel=1e-12)
    # A limit below it is found out, the step itself is none.
    assert step_s_of(problem, candidate, step_s * (1 - 1e-9), NO_ORDER)[0] == np.inf
    assert step_s_of(problem, candidate, step_s, NO_ORDER)[0] == step_s
    # Nor is what no order is below.
    assert least_s(problem, candidate.layers, np.empty(problem.num_devices)) <= step_s * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(100))
def test_memory_is_kept_or_there_is_no_step(seed: int) -> None:
    """Of stages that read nothing: the search leaves out what has arrived and waits."""
    costs, cluster, candidate, num_microbatches = _case(seed, memory_bytes=40)
    problem = Problem.of(costs, cluster, num_microbatches)
    step_s, _ = step_s_of(problem, candidate, np.inf, NO_ORDER)
    if step_s == np.inf:
        return
    plan = to_plan(problem, order_of(problem, candidate), [layer.name for layer in costs.layers])
    for curve in simulate(plan, costs, cluster).memory:
        assert curve.peak_bytes <= 40


@pytest.mark.parametrize("seed", range(100))
def test_devices_hold_what_the_simulator_says(seed: int) -> None:
    """Also if layers share parameters, which are on a device once."""
    costs, cluster, candidate, num_microbatches = _case(seed, memory_bytes=10_000)
    random = Random(seed)
    names = [layer.name for layer in costs.layers]
    layers = (
        replace(x, param_bytes=random.randint(0, 9), state_bytes=random.randint(0, 9))
        for x in costs.layers
    )
    tied = (
        TiedParams(
            layers=tuple(random.sample(names, random.randint(1, len(names)))),
            param_bytes=random.randint(0, 99),
            grad_bytes=random.randint(0, 99),
            state_bytes=random.randint(0, 99),
        )
        for _ in range(random.randint(0, 3))
    )
    costs = replace(costs, layers=tuple(layers), tied=tuple(tied))
    candidate.layers[:, RECOMPUTE] = 0  # then no program has temporaries
    problem = Problem.of(costs, cluster, num_microbatches)
    _, memory = make_stages(problem, candidate.layers)
    timeline = simulate(to_plan(problem, order_of(problem, candidate), names), costs, cluster)
    parts = "parameters", "gradients", "optimizer state"
    held = [sum(curve.peak_parts[part] for part in parts) for curve in timeline.memory]
    assert memory.tolist() == [10_000 - num_bytes for num_bytes in held]


@pytest.mark.parametrize("seed", range(100))
def test_room_for_one_microbatch_is_enough_for_any_rule(seed: int) -> None:
    """What devices keep room for can always go on, whatever else has filled them."""
    costs, cluster, candidate, num_microbatches = _case(seed, memory_bytes=10_000)
    stages, memory = make_stages(Problem.of(costs, cluster, num_microbatches), candidate.layers)
    needed, more = np.zeros(len(memory)), np.zeros(len(memory))
    np.add.at(needed, stages.home, stages.room)
    splits = ~stages.whole
    np.maximum.at(more, stages.home[splits], (stages.kept - stages.room)[splits])
    needed += more  # of the input gradient that keeps most beside what was saved
    step_s, _ = list_step_s(stages, needed, num_microbatches, candidate.rule, np.inf, NO_ORDER)
    assert step_s < np.inf
    busiest = int(np.argmax(needed))
    if needed[busiest]:
        needed[busiest] -= 1
        assert list_step_s(stages, needed, num_microbatches, candidate.rule, np.inf, NO_ORDER) == (
            np.inf,
            0,
        )


def test_what_an_input_gradient_keeps_needs_room_from_then_on() -> None:
    """If all is recomputed, three more inputs have room for the pipeline, and not three more W."""
    P, M = 4, 8
    layers = tuple(
        LayerCost(
            name=f"layer{index}",
            forward_s=1.0,
            backward_s=2.0,
            input_grad_s=1.0,
            weight_grad_s=1.0,
            saved_bytes=9,
            kept_bytes=10,
            input_bytes=1,
        )
        for index in range(P + 1)
    )
    table = np.zeros((P + 1, NUM_COLUMNS), np.int64)
    table[:, HOME] = [0, *range(P)]
    table[:, WINDOW], table[:, RECOMPUTE] = M, 1
    rule = Rule(True, 0, 0, 0.0, 0.0)

    def step_s(memory_bytes: int) -> float:
        cluster = Cluster((device(memory_bytes=memory_bytes),) * P)
        problem = Problem.of(Costs(layers), cluster, M)
        return step_s_of(problem, Candidate(table, rule), np.inf, NO_ORDER)[0]

    least = next(num_bytes for num_bytes in range(1, 100) if step_s(num_bytes) < np.inf)
    assert step_s(least) == M * (2 * (P + 1) + 2)  # one microbatch there at a time
    assert step_s(least + P - 1) == step_s(1000) < 50


def test_only_the_oldest_microbatch_has_room_kept_for_it() -> None:
    """V of two stages a device with the memory of 1F1B: ZB-V's step, 6 M + P - 1 tasks long.

    With room kept for what every microbatch still needs there, device 0 would wait.
    """
    P, M = 4, 8
    layers = tuple(
        LayerCost(
            name=f"layer{index}",
            forward_s=1.0,
            backward_s=2.0,
            input_grad_s=1.0,
            weight_grad_s=1.0,
            saved_bytes=1,
            kept_bytes=1,
        )
        for index in range(2 * P)
    )
    cluster = Cluster((device(memory_bytes=2 * P),) * P)
    problem = Problem.of(Costs(layers), cluster, M)
    table = np.zeros((2 * P, NUM_COLUMNS), np.int64)
    table[:, HOME] = [*range(P), *reversed(range(P))]
    table[P, CUT] = 1
    table[:, WINDOW] = M
    rules = (Rule(True, 0, 0, 0.0, 0.1 * tenths) for tenths in range(1, 31))
    steps_s = [step_s_of(problem, Candidate(table, rule), np.inf, NO_ORDER)[0] for rule in rules]
    assert min(steps_s) == 6 * M + P - 1


@pytest.mark.parametrize(
    ("stretch", "expected"),
    [
        (0.9, "F0.0 F1.0 B1.0 B0.0 F0.1 F1.1 B1.1 B0.1 F0.2 F1.2 B1.2 B0.2"),
        (100, "F0.0 F0.1 F0.2 F1.0 F1.1 F1.2 B1.0 B1.1 B1.2 B0.0 B0.1 B0.2"),
    ],
)
def test_what_is_due_first_goes_first(stretch: float, expected: str) -> None:
    """On one device: a microbatch after the other, or a stage after the other."""
    layers = tuple(
        LayerCost(name=name, forward_s=1.0, backward_s=2.0, input_grad_s=1.0, weight_grad_s=1.0)
        for name in "ab"
    )
    problem = Problem.of(Costs(layers), Cluster((device(),)), 3)
    table = np.array([[0, 1, 3, 1, 0]] * 2)  # CUT, WINDOW 3, WHOLE
    order = order_of(problem, Candidate(table, Rule(False, 0, 0, 0.0, stretch)))
    tasks = order.tasks[: order.num[0]].tolist()
    assert " ".join(f"{'FB'[kind]}{stage}.{m}" for stage, kind, m in tasks) == expected


def test_blocking_transfers_take_what_the_simulator_says() -> None:
    for seed in range(200):
        costs, cluster, candidate, num_microbatches = _case(seed)
        rng = Random(seed)
        link = Link(latency_s=rng.random(), bytes_per_s=rng.random() + 1)
        cluster = Cluster(cluster.devices, link)
        problem = Problem.of(costs, cluster, num_microbatches, blocking=True)
        step_s, _ = step_s_of(problem, candidate, np.inf, NO_ORDER)
        order = order_of(problem, candidate)
        plan = to_plan(problem, order, [layer.name for layer in costs.layers])
        simulated_s = simulate(plan, costs, cluster, blocking=True).step_s
        assert step_s == pytest.approx(simulated_s, rel=1e-12), seed
