"""Run a plan with transfers that hold up nobody but each other.

A device leaves a result to its link and goes on. A link goes from one device to another and carries
one transfer at a time, in the order in which they are ready. That is the order in which the tasks
that make them stand in their device's row, whatever anything takes: so no transfer can overtake
another, and no task or transfer that takes longer can make the step shorter.
"""

from collections import defaultdict

from jaxptis.performance.spans import Rows, Span, TransferSpan
from jaxptis.performance.task_costs import TaskCosts
from jaxptis.plan import Plan


def run_buffered(plan: Plan, costs: TaskCosts) -> tuple[Rows, list[TransferSpan]]:
    """Return when each task and each transfer starts and ends; transfers in no particular order."""
    num_microbatches = plan.num_microbatches
    rows: list[list[Span]] = [[] for _ in plan.schedule]
    transfers: list[TransferSpan] = []
    free_s = [0.0] * plan.num_devices
    link_free_s: defaultdict[tuple[int, int], float] = defaultdict(float)
    arrival_s = [0.0] * (2 * plan.num_stages * num_microbatches)
    for task in plan.order:
        microbatch = task.microbatch
        device, task_s, inbox, result = costs[task.stage][task.kind]
        start_s = free_s[device]
        if inbox is not None:
            there_s = arrival_s[inbox * num_microbatches + microbatch]
            if there_s > start_s:  # max() would take as long as all the rest
                start_s = there_s
        free_s[device] = end_s = start_s + task_s
        rows[device].append(Span(task, start_s, end_s))
        if result is not None:
            target, reader, link, num_bytes, transfer_s = result
            begin_s = link_free_s[link]
            if end_s > begin_s:
                begin_s = end_s
            there_s = link_free_s[link] = begin_s + transfer_s
            arrival_s[target * num_microbatches + microbatch] = there_s
            transfers.append(TransferSpan(*link, task, reader, begin_s, there_s, num_bytes))
    return rows, transfers
