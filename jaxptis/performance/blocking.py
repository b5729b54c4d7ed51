"""Run a plan as the executor does: a transfer is one program of both devices.

Each waits until the other is there, and neither computes until the transfer is over. Transfers
between two devices that follow each other in the lists of both are one program: what goes in
opposite directions goes at the same time. `meetings` says where transfers stand among the tasks.
"""

from collections import defaultdict

from jaxptis.performance.meetings import Crossing, in_sequence
from jaxptis.performance.spans import Rows, Span, TransferSpan
from jaxptis.performance.task_costs import TaskCosts, task_seconds
from jaxptis.plan import Plan, Task

_Exchange = list[Crossing]  # in one program


def run_blocking(
    plan: Plan, costs: TaskCosts, placed_by: TaskCosts
) -> tuple[Rows, list[TransferSpan]]:
    """Return when each task and each transfer starts and ends; a transfer when both are there.

    Args:
        plan: the plan to run.
        costs: of its tasks and transfers.
        placed_by: the costs that say where transfers stand.
    """
    rows: list[list[Span]] = [[] for _ in plan.schedule]
    transfers: list[TransferSpan] = []
    free_s = [0.0] * plan.num_devices
    for item in _instructions(plan, placed_by):
        if isinstance(item, Task):
            device, task_s, _, _ = costs[item.stage][item.kind]
            start_s = free_s[device]
            free_s[device] = start_s + task_s
            rows[device].append(Span(item, start_s, free_s[device]))
            continue
        made_by = [plan.schedule[each.source][each.made] for each in item]
        results = [costs[task.stage][task.kind].result for task in made_by]
        start_s = max(free_s[item[0].source], free_s[item[0].target])
        each_way: defaultdict[int, float] = defaultdict(float)
        for result in results:
            assert result is not None
            each_way[result.link[0]] += result.transfer_s
        end_s = free_s[item[0].source] = free_s[item[0].target] = start_s + max(each_way.values())
        transfers += [
            TransferSpan(*each.link, task, each.reader, start_s, end_s, each.num_bytes)
            for task, each in zip(made_by, results, strict=True)
            if each is not None
        ]
    return rows, transfers


def _instructions(plan: Plan, costs: TaskCosts) -> list[Task | _Exchange]:
    """Return the tasks and transfers of all devices in one order, which holds in every list."""
    last: dict[int, _Exchange | None] = {}
    instructions: list[Task | _Exchange] = []
    for item in in_sequence(task_seconds(plan, costs), _crossings(plan, costs)):
        if isinstance(item, Crossing):
            exchange = last.get(item.source)
            if exchange is None or exchange is not last.get(item.target):
                exchange = last[item.source] = last[item.target] = []
                instructions.append(exchange)
            exchange.append(item)
        else:
            device, number = item
            instructions.append(plan.schedule[device][number])
            last[device] = None
    return instructions


def _crossings(plan: Plan, costs: TaskCosts) -> list[Crossing]:
    """Return what goes from a device to another, and is read there."""
    read = {
        (inbox, task.microbatch): number
        for row in plan.schedule
        for number, task in enumerate(row)
        if (inbox := costs[task.stage][task.kind].inbox) is not None
    }
    return [
        Crossing(
            source=source,
            target=result.link[1],
            made=number,
            read=read[result.inbox, task.microbatch],
            seconds=result.transfer_s,
        )
        for source, row in enumerate(plan.schedule)
        for number, task in enumerate(row)
        if (result := costs[task.stage][task.kind].result) is not None
        and (result.inbox, task.microbatch) in read
    ]
