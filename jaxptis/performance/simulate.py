"""Predict a step from a plan and the costs of its layers."""

import math
from itertools import pairwise, zip_longest

from jaxptis.performance.costs import Costs
from jaxptis.performance.timeline import Span, Timeline
from jaxptis.plan import Plan, Task
from jaxptis.plan.order import execution_order, needs


def simulate(plan: Plan, costs: Costs, transfer_s: float = 0.0) -> Timeline:
    """Start every task as soon as its device is free and what it needs has arrived.

    Linear in the number of tasks.

    Args:
        plan: the plan to run.
        costs: the costs of the plan's layers, in their order.
        transfer_s: seconds from the end of a task until its result is on another device. Both
            devices compute meanwhile, and transfers do not hold each other up.

    Raises:
        ValueError: the costs are not those of the plan's layers, or `transfer_s` is negative.
    """
    _check(plan, costs, transfer_s)
    layers = [range(start, end) for start, end in pairwise(plan.boundaries)]
    tasks = frozenset(task for row in plan.schedule for task in row)
    kinds = {(task.stage, task.kind) for task in tasks}
    seconds = {(stage, kind): costs.task_s(layers[stage], kind) for stage, kind in kinds}
    device_of = [stage.device for stage in plan.stages]
    rows: list[list[Span]] = [[] for _ in plan.schedule]
    end_s: dict[Task, float] = {}
    for task in execution_order(plan.schedule):
        row = rows[device_of[task.stage]]
        start_s = row[-1].end_s if row else 0.0
        for need in needs(task, tasks):
            crosses = device_of[need.stage] != device_of[task.stage]
            start_s = max(start_s, end_s[need] + (transfer_s if crosses else 0.0))
        end_s[task] = start_s + seconds[task.stage, task.kind]
        row.append(Span(task=task, start_s=start_s, end_s=end_s[task]))
    return Timeline(tuple(map(tuple, rows)))


def _check(plan: Plan, costs: Costs, transfer_s: float) -> None:
    names = tuple(cost.name for cost in costs.layers)
    for index, (name, layer) in enumerate(zip_longest(names, plan.layers)):
        if name != layer:
            raise ValueError(
                f"layer {index} is {layer!r} in the plan ({len(plan.layers)} layers) and {name!r} "
                f"in the costs ({len(names)} layers); give the costs of the plan's layers, in order"
            )
    if not (math.isfinite(transfer_s) and transfer_s >= 0):
        raise ValueError(f"transfer_s is {transfer_s}; use finite seconds of 0 or more")
