"""Run a plan as the executor does: a transfer is one program of both devices.

Each waits until the other is there, and neither computes until the transfer is over. Transfers
between two devices that follow each other in the lists of both are one program: what goes in
opposite directions goes at the same time. `meetings` says where transfers stand among the tasks.
"""

from collections import defaultdict

from jaxptis.performance.meetings import Crossing, sequence_of
from jaxptis.performance.spans import Rows, Span, TransferSpan
from jaxptis.performance.task_costs import Result, TaskCosts
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
        else:
            source, target = item[0].source, item[0].target
            sent = [_sent(each, plan, costs) for each in item]
            start_s = max(free_s[source], free_s[target])
            end_s = free_s[source] = free_s[target] = start_s + _exchange_s(sent)
            transfers += [
                TransferSpan(*each.link, made_by, each.reader, start_s, end_s, each.num_bytes)
                for made_by, each in sent
            ]
    return rows, transfers


def _instructions(plan: Plan, costs: TaskCosts) -> list[Task | _Exchange]:
    """Return the tasks and transfers of all devices in one order, which holds in every list."""
    instructions: list[Task | _Exchange] = []
    last: dict[int, _Exchange | None] = {}
    for item in sequence_of(plan, costs):
        if isinstance(item, Task):
            instructions.append(item)
            last[costs[item.stage][item.kind].device] = None
            continue
        exchange = last.get(item.source)
        if exchange is None or exchange is not last.get(item.target):
            exchange = last[item.source] = last[item.target] = []
            instructions.append(exchange)
        exchange.append(item)
    return instructions


def _sent(crossing: Crossing, plan: Plan, costs: TaskCosts) -> tuple[Task, Result]:
    task = plan.schedule[crossing.source][crossing.made]
    result = costs[task.stage][task.kind].result
    assert result is not None, task
    return task, result


def _exchange_s(sent: list[tuple[Task, Result]]) -> float:
    """Return the seconds of the direction that takes longer."""
    each_way: defaultdict[tuple[int, int], float] = defaultdict(float)
    for _, result in sent:
        each_way[result.link] += result.transfer_s
    return max(each_way.values())
