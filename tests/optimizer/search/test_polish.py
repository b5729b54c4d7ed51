"""Steps of many tasks, changed task by task."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from jaxptis.cluster import Cluster, Link
from jaxptis.make_plan import make_plan
from jaxptis.optimizer.search.best import to_plan
from jaxptis.optimizer.search.polish import Order, order_like, order_of, order_step_s, polished
from jaxptis.optimizer.search.search import search
from jaxptis.optimizer.steps.candidate import WHOLE, Candidate, make_stages
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import Costs, LayerCost, simulate
from jaxptis.performance.check_memory import check_memory
from jaxptis.plan import Plan
from tests.clusters import device, equal_devices
from tests.published import published_costs

COSTS = published_costs("nemotron-h-4B")
CLUSTER = equal_devices(4, latency_s=1e-3)
PROBLEM = Problem.of(COSTS, CLUSTER, 16, blocking=True)
NAMES = [layer.name for layer in COSTS.layers]


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    return [each.candidate for each in search(PROBLEM, time_limit_s=0.2, seed=0)[:3]]


def step_s_of(order: Order, limit_s: float = np.inf) -> float:
    return float(order_step_s(*make_stages(PROBLEM, order.layers), PROBLEM, order, limit_s))


def plan_of(order: Order) -> Plan:
    return to_plan(PROBLEM, order, NAMES)


def simulated_s(order: Order) -> float:
    return simulate(plan_of(order), COSTS, CLUSTER, blocking=True).step_s


def test_waits_for_transfers_get_shorter(candidates: list[Candidate]) -> None:
    before = [order_of(PROBLEM, each) for each in candidates]
    assert min(order.num[0] for order in before) > 200
    after = polished(PROBLEM, candidates, before, 20_000_000, seed=0)
    best = min(after, key=step_s_of)
    assert step_s_of(best) < 0.995 * min(map(step_s_of, before))
    assert all(step_s_of(x) == pytest.approx(simulated_s(x), rel=1e-12) for x in after)
    again = polished(PROBLEM, candidates, before, 20_000_000, seed=0)
    assert [plan_of(each) for each in again] == [plan_of(each) for each in after]


def test_free_transfers_leave_many_tasks_as_they_are(candidates: list[Candidate]) -> None:
    orders = [order_of(PROBLEM, each) for each in candidates]
    free = PROBLEM._replace(blocking=False)
    assert polished(free, candidates, orders, 20_000_000, seed=0) == []


def test_another_plan_is_polished_too(candidates: list[Candidate]) -> None:
    """But not one that lacks memory."""
    plan = make_plan(COSTS, "zb-h2", cluster=CLUSTER, num_microbatches=16)
    other = order_like(PROBLEM, plan)
    assert plan_of(other) == plan
    slow = candidates[:1]
    orders = [order_of(PROBLEM, *slow), other]
    after = polished(PROBLEM, slow, orders, 10_000_000, seed=0)
    polished_s = min(step_s_of(x) for x in after if plan_of(x).stages == plan.stages)
    assert polished_s < step_s_of(other)
    lacks = PROBLEM._replace(memory=np.zeros(4))
    assert polished(lacks, slow, orders, 1_000_000, seed=0) == []


def test_polished_orders_keep_the_memory() -> None:
    """A backward that is split keeps more: stages told whole have no room for that."""
    layer = LayerCost(
        name="",
        forward_s=1.0,
        backward_s=2.0,
        input_grad_s=1.0,
        weight_grad_s=1.0,
        recompute_s=1.0,
        param_bytes=100,
        input_bytes=1,
        saved_bytes=200,
        kept_bytes=90,
        made_bytes=100,
        forward_temporary_bytes=20,
        backward_temporary_bytes=40,
        input_grad_temporary_bytes=30,
        weight_grad_temporary_bytes=500,
    )
    costs = Costs(tuple(replace(layer, name=f"layer{i}") for i in range(16)))
    cluster = Cluster((device(memory_bytes=1500),) * 4, Link(latency_s=0.1))
    problem = Problem.of(costs, cluster, 16, blocking=True)
    candidates = [each.candidate for each in search(problem, time_limit_s=0.2, seed=0)[:4]]
    assert any(each.layers[:, WHOLE].any() for each in candidates)
    orders = [order_of(problem, each) for each in candidates]
    after = polished(problem, candidates, orders, 10_000_000, seed=0)
    plans = [to_plan(problem, each, [x.name for x in costs.layers]) for each in after]
    for plan in plans:
        check_memory(simulate(plan, costs, cluster, blocking=True), cluster)
    assert len(plans) == 4 + 2


def test_any_order_takes_what_the_simulator_says_or_both_refuse(
    candidates: list[Candidate],
) -> None:
    random = Random(0)
    start = order_of(PROBLEM, candidates[0])
    refused = 0
    for _ in range(60):
        order = Order(start.layers, start.tasks.copy(), start.num)
        for _ in range(random.randrange(1, 4)):
            i = random.randrange(start.num[0])
            j = min(start.num[0] - 1, i + random.randrange(20))
            order.tasks[i : j + 1] = np.roll(order.tasks[i : j + 1], 1, axis=0)
        step_s = step_s_of(order)
        if step_s == np.inf:
            refused += 1
            with pytest.raises(ValueError, match=r"circle|deadlock|which it needs"):
                simulated_s(order)
        else:
            assert step_s == pytest.approx(simulated_s(order), rel=1e-12)
            assert step_s_of(order, step_s * 0.999) == np.inf
            assert step_s_of(order, step_s) == step_s
    assert 0 < refused < 60
