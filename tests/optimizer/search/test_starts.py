"""Candidates like known plans: with the same stages, possible in the same memory, about as long."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from jaxptis.cluster import Cluster
from jaxptis.make_plan import make_plan
from jaxptis.optimizer.search.best import to_plan
from jaxptis.optimizer.search.polish import order_of
from jaxptis.optimizer.search.starts import in_memory, layers_like, shortest, starts_of
from jaxptis.optimizer.steps.candidate import RECOMPUTE
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import Costs, LayerCost, simulate
from jaxptis.plan import Plan
from jaxptis.schedules import FAMILIES
from tests.clusters import device, equal_devices

NUM_DEVICES, NUM_MICROBATCHES = 4, 8
COSTS = Costs(
    tuple(
        LayerCost(
            name=f"layer{index}",
            forward_s=1.0 + index % 3 / 4,
            backward_s=2.0,
            input_grad_s=1.0,
            weight_grad_s=1.0,
            recompute_s=1.0,
            param_bytes=100,
            input_bytes=10,
            saved_bytes=200,
            saved_all_bytes=0,
            kept_bytes=90,
            made_bytes=15,
            forward_temporary_bytes=20,
            backward_temporary_bytes=40,
            input_grad_temporary_bytes=30,
            weight_grad_temporary_bytes=25,
            backward_held_bytes=35,
            input_grad_held_bytes=12,
        )
        for index in range(16)
    )
)


def like(strategy: str, *, recompute: bool, costs: Costs = COSTS) -> Plan:
    plan = make_plan(
        costs, strategy, cluster=equal_devices(NUM_DEVICES), num_microbatches=NUM_MICROBATCHES
    )
    if not recompute:
        return plan
    return replace(plan, stages=tuple(replace(x, recompute="all") for x in plan.stages))


def splits(plan: Plan) -> bool:
    return any(task.kind == "I" for row in plan.schedule for task in row)


@pytest.mark.parametrize("strategy", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_same_stages(strategy: str, recompute: bool) -> None:
    plan = like(strategy, recompute=recompute)
    problem = Problem.of(COSTS, equal_devices(NUM_DEVICES), NUM_MICROBATCHES)
    _, candidate = shortest(problem, layers_like(plan)) or (0, None)
    assert candidate
    found = to_plan(problem, order_of(problem, candidate), plan.layers)
    assert found.stages == plan.stages
    assert splits(found) == splits(plan)


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b", "interleaved"])
def test_possible_in_the_memory_of_the_plan_if_all_is_recomputed(strategy: str) -> None:
    """What would be kept between a split backward's halves does not count where none is split."""
    plan = like(strategy, recompute=True)
    timeline = simulate(plan, COSTS)
    limit = max(curve.peak_bytes for curve in timeline.memory)
    cluster = Cluster((device(memory_bytes=limit),) * NUM_DEVICES)
    problem = Problem.of(COSTS, cluster, NUM_MICROBATCHES)
    step_s, candidate = shortest(problem, layers_like(plan)) or (0, None)
    assert candidate
    found = simulate(to_plan(problem, order_of(problem, candidate), plan.layers), COSTS)
    assert found.step_s == pytest.approx(step_s)
    assert max(curve.peak_bytes for curve in found.memory) <= limit
    assert found.step_s < 1.1 * timeline.step_s  # a rule does not make quite the same order


@pytest.mark.parametrize("strategy", ["1f1b", "interleaved"])
def test_memory_that_is_there_saves_recomputation(strategy: str) -> None:
    """With half of the memory by which saving all exceeds recomputing all."""
    plans = [like(strategy, recompute=recompute) for recompute in (False, True)]
    peaks = [max(x.peak_bytes for x in simulate(plan, COSTS).memory) for plan in plans]
    cluster = Cluster((device(memory_bytes=sum(peaks) // 2),) * NUM_DEVICES)
    problem = Problem.of(COSTS, cluster, NUM_MICROBATCHES)
    as_planned, recomputed, filled = starts_of(problem, plans[:1])
    assert 0 < np.sum(filled[:, RECOMPUTE]) < len(COSTS.layers)
    steps_s = [(shortest(problem, x) or (inf,))[0] for x in (as_planned, recomputed, filled)]
    assert steps_s[2] < min(steps_s[:2])
    plan = in_memory(problem, plans[0])
    found = simulate(plan, COSTS)
    assert plan.schedule == plans[0].schedule
    assert max(curve.peak_bytes for curve in found.memory) <= sum(peaks) // 2
    assert found.step_s < simulate(plans[1], COSTS).step_s


def test_what_weight_gradients_keep_has_room() -> None:
    """Where an input gradient keeps more than was saved, what is saved is not all that counts."""
    costs = Costs(tuple(replace(layer, kept_bytes=400) for layer in COSTS.layers))
    plans = [like("v-half", recompute=recompute, costs=costs) for recompute in (True, False)]
    least, most = (max(x.peak_bytes for x in simulate(plan, costs).memory) for plan in plans)
    assert least < most
    saved = []
    for limit in (least + most) // 2, most, 2 * most:
        cluster = Cluster((device(memory_bytes=limit),) * NUM_DEVICES)
        plan = in_memory(Problem.of(costs, cluster, NUM_MICROBATCHES), plans[1])
        assert max(x.peak_bytes for x in simulate(plan, costs).memory) <= limit
        saved.append(sum(stage.recompute != "all" for stage in plan.stages))
    assert saved[0] <= saved[1] <= saved[2] == plans[1].num_stages


@pytest.mark.parametrize("strategy", ["1f1b", "zb-v", "interleaved"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_what_is_possible_fits(strategy: str, share: float) -> None:
    """As the simulator counts; with a share of what saving all takes more than recomputing all."""
    plans = [like(strategy, recompute=recompute) for recompute in (True, False)]
    least, most = (max(x.peak_bytes for x in simulate(plan, COSTS).memory) for plan in plans)
    limit = int(least + share * (most - least))
    cluster = Cluster((device(memory_bytes=limit),) * NUM_DEVICES)
    problem = Problem.of(COSTS, cluster, NUM_MICROBATCHES)
    for layers in starts_of(problem, plans):
        _, candidate = shortest(problem, layers) or (0, None)
        if candidate:
            plan = to_plan(problem, order_of(problem, candidate), plans[0].layers)
            assert max(x.peak_bytes for x in simulate(plan, COSTS).memory) <= limit
