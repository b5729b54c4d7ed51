"""The best plan that a search finds, by the performance model, and never a worse one than given."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from math import inf
from operator import attrgetter
from typing import NamedTuple, Self

import numpy as np

from jaxptis.cluster import Cluster
from jaxptis.optimizer.certificate.certificate import certify
from jaxptis.optimizer.search.polish import Order, order_like, order_of, polished, polishes_many
from jaxptis.optimizer.search.search import TASKS_PER_S, search
from jaxptis.optimizer.search.starts import in_memory, starts_of
from jaxptis.optimizer.steps.candidate import HOME, RECOMPUTE, begins_stage
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import Costs, simulate
from jaxptis.performance.check_memory import lacking_bytes
from jaxptis.plan import Plan, StagePlan, Task
from jaxptis.plan.task import KINDS

_FINALISTS = 8  # are simulated as all plans are
_OTHERS = 2  # plans of others are polished
_POLISHED = 0.3  # of the time limit
_SEARCHES = 4  # at most: later ones if what was found needs more memory than the search counted
_SHOWN = 0.7  # of what is left, as the progress of a search
_CLOSE = 1.01  # times the shortest step of a search, whether it fits or not, is short enough


class _Tried(NamedTuple):
    plan: Plan
    step_s: float  # as it will run
    lacking_bytes: int  # of the device that lacks most

    @classmethod
    def of(cls, plan: Plan, costs: Costs, cluster: Cluster, blocking: bool) -> Self:
        timeline = simulate(plan, costs, cluster, blocking=blocking)
        return cls(plan, timeline.step_s, max(lacking_bytes(timeline, cluster)))


def best_plan(
    costs: Costs,
    cluster: Cluster,
    num_microbatches: int,
    *,
    others: Iterable[Plan] = (),
    time_limit_s: float = 10.0,
    tolerance: float = 1e-3,
    seed: int = 0,
    blocking: bool = True,
    on_progress: Callable[[float, float], None] | None = None,
) -> Plan:
    """Search partition, placement, schedule, split backwards and recomputation together.

    Args:
        costs: of the layers.
        cluster: the devices, with their memory, speed and links.
        num_microbatches: of a step.
        others: plans for the same, of all layers: the search begins with them, too, and what is
            returned is no worse than any that fits the memory.
        time_limit_s: how long to search, on about two cores. It stands for an amount of work: the
            same limit and seed find the same plan on a slower machine. Small models take less; up
            to four times as long, if the shortest steps need more memory than the search counted.
        tolerance: the search ends when the gap to the certificate's bound is no larger; a fraction.
        seed: of what is drawn.
        blocking: whether transfers hold up both of their devices, as when a plan runs; if not, they
            only take time.
        on_progress: is told now and then which fraction is done, and the shortest step that was
            found, in seconds; infinite if there is none. If that lacks memory, the search begins
            again, and with it what is the shortest.

    Raises:
        ValueError: no plan can fit the memory (says what would do), or none was found that does.

    A device may be left without a stage: a slow one may be no help, and there may be fewer layers
    than devices.
    """
    num_layers, num_devices = len(costs.layers), len(cluster.devices)
    enough_s = certify(costs, cluster, num_microbatches).bound_s * (1 + tolerance)
    names = [layer.name for layer in costs.layers]
    problem = Problem.of(costs, cluster, num_microbatches, blocking=blocking)
    others = list(others)
    known = list(others)
    if np.min(problem.memory) < inf:
        known += [in_memory(problem, plan) for plan in known]
    fit = _fitting(_Tried.of(plan, costs, cluster, blocking) for plan in dict.fromkeys(known))
    begun = [order_like(problem, each.plan) for each in fit[:_OTHERS]]

    def show(number: int, done: float, step_s: float) -> None:
        if on_progress:  # another search may follow, and is shown in what is left
            shortest_s = min(step_s, fit[0].step_s if fit else inf)
            on_progress(1 - (1 - _SHOWN) ** number * (1 - _SHOWN * done), shortest_s)

    goal_s, less_bytes, begin_with = enough_s, 0.0, list(others)
    for number in range(_SEARCHES):
        if fit and fit[0].step_s <= goal_s:
            break
        found, changed = _search_once(
            problem._replace(memory=np.maximum(problem.memory - less_bytes, 0.0)),
            begin_with,
            begun,
            time_limit_s=time_limit_s,
            seed=seed,
            enough_s=enough_s,
            on_progress=partial(show, number),
        )
        plans = [to_plan(problem, order, names) for order in [*found, *changed]]
        new = [_Tried.of(plan, costs, cluster, blocking) for plan in plans]
        if not new and not less_bytes:
            break  # the same search would find nothing again
        fit = _fitting([*fit, *new])
        goal_s = max(enough_s, _CLOSE * min((each.step_s for each in new), default=0.0))
        # Twice as much of what lacks each time: it lacks again where other plans are found.
        lacking = [each.lacking_bytes for each in new if each.lacking_bytes]
        less_bytes = less_bytes + 2**number * min(lacking) if lacking else less_bytes / 2
        begin_with += plans[: len(found)]
    if not fit:
        raise ValueError(
            f"no plan was found in which {num_layers} layers fit the memory of {num_devices} "
            "devices; pass more devices, or use smaller microbatches"
        )
    if on_progress:
        on_progress(1.0, fit[0].step_s)
    return fit[0].plan


def _search_once(
    problem: Problem,
    others: Sequence[Plan],
    begun: Sequence[Order],
    *,
    time_limit_s: float,
    seed: int,
    enough_s: float,
    on_progress: Callable[[float, float], None],
) -> tuple[list[Order], list[Order]]:
    """Return the orders of the best candidates, and orders that were changed task by task.

    Args:
        problem: what to plan.
        others: the search begins with these plans, too.
        begun: orders to change, beside those that are found.
        time_limit_s: see `best_plan`.
        seed: of what is drawn.
        enough_s: a step as short as this ends the search.
        on_progress: see `search`.
    """
    searched = 1 - _POLISHED if polishes_many(problem) else 1.0
    found = search(
        problem,
        time_limit_s=time_limit_s * searched,
        seed=seed,
        starts=starts_of(problem, others),
        enough_s=enough_s,
        on_progress=on_progress,
    )[:_FINALISTS]
    candidates = [each.candidate for each in found]
    orders = [order_of(problem, candidate) for candidate in candidates]
    if not found or found[0].step_s <= enough_s:
        return orders, []
    num_tasks = int(_POLISHED * time_limit_s * 2 * TASKS_PER_S)
    return orders, polished(problem, candidates, [*orders, *begun], num_tasks, seed)


def _fitting(tried: Iterable[_Tried]) -> list[_Tried]:
    """Return those that fit the memory, the shortest first."""
    return sorted((each for each in tried if not each.lacking_bytes), key=attrgetter("step_s"))


def to_plan(problem: Problem, order: Order, names: Sequence[str]) -> Plan:
    """Return the plan of a step that is possible, with layers of these names."""
    layers, num_tasks = order.layers, order.num[0]
    starts = [layer for layer in range(len(layers)) if begins_stage(layers, layer)]
    stages = tuple(
        StagePlan(
            layers=tuple(names[a:b]),
            device=int(layers[a, HOME]),
            recompute="all" if layers[a, RECOMPUTE] else "cheap",
        )
        for a, b in pairwise([*starts, len(layers)])
    )
    rows: list[list[Task]] = [[] for _ in range(problem.num_devices)]
    for stage, kind, microbatch in order.tasks[:num_tasks].tolist():
        rows[stages[stage].device].append(Task(stage, KINDS[kind], microbatch))
    return Plan(stages=stages, schedule=tuple(map(tuple, rows)))
