"""Steps of many tasks, changed task by task."""

from random import Random

import numpy as np
import pytest

from jaxptis.optimizer.search.best import to_plan
from jaxptis.optimizer.search.polish import Order, order_of, order_step_s, polished
from jaxptis.optimizer.search.search import search
from jaxptis.optimizer.steps.candidate import Candidate, make_stages
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import simulate
from tests.clusters import equal_devices
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


def simulated_s(order: Order) -> float:
    return simulate(to_plan(PROBLEM, order, NAMES), COSTS, CLUSTER, blocking=True).step_s


def test_waits_for_transfers_get_shorter(candidates: list[Candidate]) -> None:
    before = [order_of(PROBLEM, each) for each in candidates]
    assert min(order.num[0] for order in before) > 200
    best, second = polished(PROBLEM, candidates, 20_000_000, seed=0)
    assert step_s_of(best) <= step_s_of(second)
    assert step_s_of(best) < 0.995 * min(map(step_s_of, before))
    assert step_s_of(best) == pytest.approx(simulated_s(best), rel=1e-12)
    again, _ = polished(PROBLEM, candidates, 20_000_000, seed=0)
    assert to_plan(PROBLEM, again, NAMES) == to_plan(PROBLEM, best, NAMES)


def test_free_transfers_leave_many_tasks_as_they_are(candidates: list[Candidate]) -> None:
    assert polished(PROBLEM._replace(blocking=False), candidates, 20_000_000, seed=0) == []


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
            with pytest.raises(ValueError):
                simulated_s(order)
        else:
            assert step_s == pytest.approx(simulated_s(order), rel=1e-12)
            assert step_s_of(order, step_s * 0.999) == np.inf
            assert step_s_of(order, step_s) == step_s
    assert 0 < refused < 60
