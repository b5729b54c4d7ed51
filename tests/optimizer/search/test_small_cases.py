"""What best finds, beside the shortest step of all plans; and that steps task by task add up."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from jaxptis.cluster import Cluster, Link
from jaxptis.optimizer import best_plan
from jaxptis.optimizer.search.anneal import step_s_of
from jaxptis.optimizer.search.best import to_plan
from jaxptis.optimizer.search.polish import order_of, polished
from jaxptis.optimizer.search.search import search
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import simulate
from jaxptis.performance.check_memory import check_memory
from tests.optimizer.every_schedule import shortest_s
from tests.optimizer.tiny_cases import tiny_case

CLOSE = 1.01


def test_of_small_cases_hardly_any_plan_is_shorter(num_tiny_cases: int) -> None:
    lengths = []
    for seed in range(num_tiny_cases):
        costs, cluster, num_microbatches = tiny_case(seed)
        plan = best_plan(costs, cluster, num_microbatches, time_limit_s=0.5, blocking=False)
        found_s = simulate(plan, costs, cluster).step_s
        shortest, _ = shortest_s(
            costs, cluster, num_microbatches, found_s * (1 + 1e-9), max_nodes=50_000
        )
        lengths.append(found_s / shortest)
    close = np.array(lengths) <= CLOSE
    print(f"{close.sum()} of {len(close)} within 1 %, longest {max(lengths):.4f}")
    assert np.mean(close) >= 0.95


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("blocking", [False, True])
def test_a_changed_step_takes_what_the_simulator_says(seed: int, blocking: bool) -> None:
    costs, cluster, num_microbatches = tiny_case(Random(seed).randrange(10_000))
    cluster = Cluster(cluster.devices, Link(latency_s=0.25 * blocking))
    problem = Problem.of(costs, cluster, num_microbatches, blocking=blocking)
    candidate = search(problem, time_limit_s=0.001, seed=0)[0].candidate
    (order,) = polished(problem, [candidate], [order_of(problem, candidate)], 50_000, seed)
    plan = to_plan(problem, order, [layer.name for layer in costs.layers])  # is checked
    step_s = simulate(plan, costs, cluster, blocking=blocking).step_s
    before_s, _ = step_s_of(problem, candidate, np.inf, np.empty((0, 3), np.int64))
    assert step_s <= before_s * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_plans_of_few_tasks_keep_the_memory(seed: int) -> None:
    """Also if a stage that recomputes needs less than its layers would one by one."""
    costs, cluster, num_microbatches = tiny_case(seed)
    layers = (
        replace(x, recompute_s=x.forward_s, input_bytes=2 * (i > 0), saved_bytes=5, kept_bytes=3)
        for i, x in enumerate(costs.layers)
    )
    costs = replace(costs, layers=tuple(layers))
    devices = (replace(x, memory_bytes=40) for x in cluster.devices)
    cluster = Cluster(tuple(devices))
    plan = best_plan(costs, cluster, num_microbatches, time_limit_s=0.02)
    check_memory(simulate(plan, costs, cluster, blocking=True), cluster)
