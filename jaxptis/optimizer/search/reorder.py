"""Another order for the stages of a plan: what can be changed of it without a compilation."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import inf

import numpy as np

from jaxptis.cluster import Cluster
from jaxptis.optimizer.steps.list_kernel import (
    DEEPEST,
    OLDEST,
    SHALLOWEST,
    Rule,
    Stages,
    list_step_s,
)
from jaxptis.performance import Costs, Timeline, simulate
from jaxptis.performance.memory import MemoryCurve
from jaxptis.plan import Plan, Task
from jaxptis.plan.task import KINDS

_FINALISTS = 8  # are simulated with transfers that block; the kernel knows them only as delays
_NUM_TASKS = 10_000_000  # of the kernel: a second or two
_MOST_TRIED = 2000


def reorder(plan: Plan, costs: Costs, cluster: Cluster) -> Plan:
    """Return the stages of a plan in the order with the shortest predicted step.

    List schedules of many rules are tried, and of many windows: the most microbatches that a stage
    has between forward and backward. A stage keeps the kinds of task that it has programs for. No
    device needs more memory than it has; one of which that is not known, no more than before.

    Args:
        plan: to begin with, with backwards; it is returned if nothing better is found.
        costs: of its layers.
        cluster: the devices, and how fast they are now.

    Raises:
        ValueError: the costs are not those of the plan's layers, or there are fewer devices.
    """
    before = simulate(plan, costs, cluster, blocking=True)
    found: dict[float, tuple[Stages, Rule]] = {}
    for stages, rule in _tries(plan, costs, cluster):
        step_s, _ = _run(stages, plan, rule)
        if step_s < inf:
            found.setdefault(step_s, (stages, rule))
    best, best_s = plan, before.step_s
    for _, (stages, rule) in sorted(found.items(), key=lambda each: each[0])[:_FINALISTS]:
        other = replace(plan, schedule=_run(stages, plan, rule, ordered=True)[1])
        timeline = simulate(other, costs, cluster, blocking=True)
        if timeline.step_s < best_s and _fits(timeline, before.memory, cluster):
            best, best_s = other, timeline.step_s
    return best


def _tries(plan: Plan, costs: Costs, cluster: Cluster) -> Iterator[tuple[Stages, Rule]]:
    """Yield stages and rules: each rule of a list with few windows, then random ones."""
    M, S = plan.num_microbatches, plan.num_stages
    stages = _stages(plan, costs, cluster)
    kinds = [{t.kind for row in plan.schedule for t in row if t.stage == s} for s in range(S)]
    may_split = np.array([{"I", "W"} <= each for each in kinds])
    may_join = np.array(["B" in each for each in kinds])
    wholes = [~may_split, may_join] if (may_split & may_join).any() else [may_join]
    orders = OLDEST, DEEPEST, SHALLOWEST
    patiences = 0.0, 0.25, 0.5, 0.75
    rules = [Rule(*each, 0.0) for each in product((True, False), orders, orders, patiences)]
    rules += [Rule(True, OLDEST, OLDEST, *each) for each in product(patiences, (1.0, 2.0, 3.0))]
    windows = [window_of(plan), np.full(S, M), np.minimum(M, np.arange(S, 0, -1))]
    fixed = [*product(rules, windows, wholes)]
    for rule, window, whole in fixed:
        yield stages._replace(window=window, whole=whole), rule
    rng = random.Random(0)
    for _ in range(min(_MOST_TRIED, _NUM_TASKS // (3 * M * S)) - len(fixed)):
        base = rng.choice(windows)
        window = np.array([min(M, max(1, w + rng.randint(-2, 2))) for w in base.tolist()])
        yield stages._replace(window=window, whole=rng.choice(wholes)), rng.choice(rules)


def _stages(plan: Plan, costs: Costs, cluster: Cluster) -> Stages:
    """Return the stages of a plan for the kernel; windows stand for the memory."""
    S = plan.num_stages
    home = [stage.device for stage in plan.stages]
    ranges = [range(start, end) for start, end in pairwise(plan.boundaries)]
    seconds = [
        [
            costs.task_s(layers, kind, stage.recompute) / cluster.devices[stage.device].speed
            for kind in KINDS
        ]
        for layers, stage in zip(ranges, plan.stages, strict=True)
    ]
    lag_s = np.zeros((S, 2))
    for s in range(S - 1):
        num_bytes = costs.layers[ranges[s + 1].start].crossing_bytes
        if home[s] != home[s + 1]:
            there, back = (home[s], home[s + 1]), (home[s + 1], home[s])
            lag_s[s, 0] = cluster.link_between(*there).transfer_s(num_bytes)
            lag_s[s + 1, 1] = cluster.link_between(*back).transfer_s(num_bytes)
    return Stages(
        home=np.array(home),
        seconds=np.array(seconds),
        lag_s=lag_s,
        room=np.zeros(S),
        kept=np.zeros(S),
        window=np.full(S, plan.num_microbatches),
        whole=np.zeros(S, np.bool_),
    )


def window_of(plan: Plan) -> np.ndarray:
    """Return for each stage the most microbatches that the plan has between F and B or I."""
    now, most = np.zeros(plan.num_stages, np.int64), np.zeros(plan.num_stages, np.int64)
    for task in (task for row in plan.schedule for task in row if task.kind != "W"):
        now[task.stage] += 1 if task.kind == "F" else -1
        most[task.stage] = max(most[task.stage], now[task.stage])
    return most


def _run(
    stages: Stages, plan: Plan, rule: Rule, *, ordered: bool = False
) -> tuple[float, tuple[tuple[Task, ...], ...]]:
    """Return the seconds of a step, and its rows if it is to be `ordered`."""
    M, P = plan.num_microbatches, plan.num_devices
    order = np.empty((3 * M * plan.num_stages if ordered else 0, 3), np.int64)
    step_s, num_tasks = list_step_s(stages, np.full(P, inf), M, rule, inf, order)
    rows: list[list[Task]] = [[] for _ in range(P)]
    for stage, kind, microbatch in order[:num_tasks].tolist():
        rows[plan.stages[stage].device].append(Task(stage, KINDS[kind], microbatch))
    return step_s, tuple(map(tuple, rows))


def _fits(timeline: Timeline, before: Sequence[MemoryCurve], cluster: Cluster) -> bool:
    return all(
        now.peak_bytes <= (old.peak_bytes if device.memory_bytes is None else device.memory_bytes)
        for now, old, device in zip(timeline.memory, before, cluster.devices, strict=False)
    )
