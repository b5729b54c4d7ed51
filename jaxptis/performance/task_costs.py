"""What every task of a plan takes, waits for and hands on, looked up once for a stage and kind."""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from jaxptis.cluster import Cluster, Link
from jaxptis.performance.costs import Costs
from jaxptis.plan import Plan
from jaxptis.plan.task import KINDS


class Result(NamedTuple):
    """What a task makes for a stage on another device.

    Attributes:
        inbox: the number of the reader's inbox that it goes to.
        reader: the stage.
        link: the devices that it goes from and to.
        num_bytes: its size.
        transfer_s: seconds that a transfer of it takes.
    """

    inbox: int
    reader: int
    link: tuple[int, int]
    num_bytes: int
    transfer_s: float


class TaskCost(NamedTuple):
    """What a task takes.

    Attributes:
        device: that runs it.
        task_s: seconds that it runs.
        inbox: the number of the inbox that it reads; None if it waits for no other device.
        result: what it makes for another device, if anything.
    """

    device: int
    task_s: float
    inbox: int | None
    result: Result | None


TaskCosts = tuple[Mapping[str, TaskCost], ...]
"""Of every stage, by kind of task. A stage has two inboxes: 2 s for inputs, 2 s + 1 for gradients;
each has one place a microbatch."""


def task_costs(plan: Plan, costs: Costs, cluster: Cluster | None) -> TaskCosts:
    """Look up what the tasks of every stage take; the costs must be those of the plan's layers."""
    home = [stage.device for stage in plan.stages]
    last = plan.num_stages - 1
    ranges = [range(start, end) for start, end in pairwise(plan.boundaries)]
    # What crosses from the stage before, or goes back there as a gradient.
    num_bytes = [costs.layers[layers.start].crossing_bytes for layers in ranges]

    def result(stage: int, reader: int) -> Result | None:
        if not 0 <= reader <= last or home[stage] == home[reader]:
            return None
        crossing = num_bytes[max(stage, reader)]
        ends = home[stage], home[reader]
        link = Link() if cluster is None else cluster.link_between(*ends)
        inbox = 2 * reader + (reader < stage)
        return Result(inbox, reader, ends, crossing, link.transfer_s(crossing))

    def of_stage(stage: int) -> dict[str, TaskCost]:
        device, recompute = home[stage], plan.stages[stage].recompute
        speed = 1.0 if cluster is None else cluster.devices[device].speed
        seconds = [costs.task_s(ranges[stage], kind, recompute) / speed for kind in KINDS]
        forward, full, input_grad, weight_grad = seconds
        x = 2 * stage if stage and home[stage - 1] != device else None
        d = 2 * stage + 1 if stage < last and home[stage + 1] != device else None
        back = result(stage, stage - 1)
        return {
            "F": TaskCost(device, forward, x, result(stage, stage + 1)),
            "B": TaskCost(device, full, d, back),
            "I": TaskCost(device, input_grad, d, back),
            "W": TaskCost(device, weight_grad, None, None),
        }

    return tuple(map(of_stage, range(plan.num_stages)))
