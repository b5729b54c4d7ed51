"""Run a plan as the executor does: a transfer is one program of both devices.

Each waits until the other is there, and neither computes until the transfer is over. Transfers
between two devices that follow each other in the lists of both are one program: what goes in
opposite directions goes at the same time.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxptis.performance.spans import Rows, Span, TransferSpan
from jaxptis.performance.task_costs import Result, TaskCosts
from jaxptis.performance.transfers import Places, in_sequence
from jaxptis.plan import Plan, Task


class _Transfer(NamedTuple):
    made_by: Task
    result: Result


_Exchange = list[_Transfer]  # in one program


def run_blocking(plan: Plan, costs: TaskCosts, unhindered: Rows) -> tuple[Rows, list[TransferSpan]]:
    """Return when each task and each transfer starts and ends; a transfer when both are there.

    Args:
        plan: the plan to run.
        costs: of its tasks and transfers.
        unhindered: when its tasks would run if transfers took no time: says where they stand.
    """
    rows: list[list[Span]] = [[] for _ in plan.schedule]
    transfers: list[TransferSpan] = []
    free_s = [0.0] * plan.num_devices
    for item in _instructions(in_sequence(plan, unhindered), costs):
        if isinstance(item, Task):
            device, task_s, _, _ = costs[item.stage][item.kind]
            start_s = free_s[device]
            free_s[device] = start_s + task_s
            rows[device].append(Span(item, start_s, free_s[device]))
        else:
            source, target = item[0].result.link
            start_s = max(free_s[source], free_s[target])
            end_s = free_s[source] = free_s[target] = start_s + _exchange_s(item)
            transfers += [
                TransferSpan(*each.link, made_by, each.reader, start_s, end_s, each.num_bytes)
                for made_by, each in item
            ]
    return rows, transfers


def _exchange_s(exchange: _Exchange) -> float:
    """Return the seconds of the direction that takes longer."""
    if len(exchange) == 1:
        return exchange[0].result.transfer_s
    each_way: defaultdict[tuple[int, int], float] = defaultdict(float)
    for _, result in exchange:
        each_way[result.link] += result.transfer_s
    return max(each_way.values())


_Sequence = Sequence[tuple[int, Span]]  # all tasks, each with its device


def _instructions(sequence: _Sequence, costs: TaskCosts) -> list[Task | _Exchange]:
    """Return the tasks and transfers of all devices in one order, which holds in every list."""
    due = _due(sequence, costs)
    instructions: list[Task | _Exchange] = []
    last: defaultdict[int, _Exchange | None] = defaultdict(lambda: None)
    for position, (device, span) in enumerate(sequence):
        for transfer in due.get(position, ()):
            source, target = transfer.result.link
            exchange = last[source]
            if exchange is None or exchange is not last[target]:
                exchange = last[source] = last[target] = []
                instructions.append(exchange)
            exchange.append(transfer)
        instructions.append(span.task)
        last[device] = None
    return instructions


def _due(sequence: _Sequence, costs: TaskCosts) -> Mapping[int, list[_Transfer]]:
    """Return the transfers that stand before each position of the sequence."""
    places = Places(sequence)
    due: defaultdict[int, list[_Transfer]] = defaultdict(list)
    made: dict[tuple[int, int], tuple[int, _Transfer]] = {}  # by inbox and microbatch
    for position, (_, span) in enumerate(sequence):
        task = span.task
        _, _, inbox, result = costs[task.stage][task.kind]
        if inbox is not None:
            start, transfer = made.pop((inbox, task.microbatch))
            due[places.best(*transfer.result.link, start, position)].append(transfer)
        if result is not None:
            made[result.inbox, task.microbatch] = position, _Transfer(task, result)
    return due
