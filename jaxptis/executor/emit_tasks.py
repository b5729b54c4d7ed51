"""From a plan and what its tasks cost to the instruction lists of the devices.

A transfer blocks both devices until both are there; `performance.meetings` says where it stands.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxptis.executor.instructions import Rows
from jaxptis.executor.tasks import TaskPrograms
from jaxptis.performance.meetings import Crossing, in_sequence
from jaxptis.performance.task_costs import TaskCosts, task_seconds
from jaxptis.plan import Plan


@dataclass(frozen=True, kw_only=True)
class _Transfer(Crossing):
    buffer: str


def emit_tasks(rows: Rows, plan: Plan, costs: TaskCosts, programs: TaskPrograms) -> None:
    """Append the tasks of the plan and the transfers between them."""
    transfers = [*_transfers(plan, costs, programs)]
    for item in in_sequence(task_seconds(plan, costs), transfers):
        if isinstance(item, _Transfer):
            rows.transfer(item.source, item.target, item.buffer)
            continue
        device, number = item
        task = plan.schedule[device][number]
        program = programs.get((task.stage, task.kind))
        if program is not None:
            reads = [ref.of(task.microbatch) for ref in program.reads]
            writes = [ref.of(task.microbatch) for ref in program.writes]
            rows.run(device, program.name, reads, writes, task)


def _transfers(plan: Plan, costs: TaskCosts, programs: TaskPrograms) -> Iterator[_Transfer]:
    """Yield what a device is sent: each buffer once, before the first task that reads it.

    The first buffer of a result takes as long as the transfer of the result, the others no longer.
    """
    home = [stage.device for stage in plan.stages]
    read: dict[tuple[int, str], int] = {}
    for device, row in enumerate(plan.schedule):
        for number, task in enumerate(row):
            program = programs.get((task.stage, task.kind))
            for ref in program.reads if program else ():
                read.setdefault((device, ref.of(task.microbatch)), number)
    for source, row in enumerate(plan.schedule):
        for number, task in enumerate(row):
            program = programs.get((task.stage, task.kind))
            result = costs[task.stage][task.kind].result
            seconds = {} if result is None else {result.link[1]: result.transfer_s}
            sends = program.sends if program else ()
            # Several stages of a device may read one.
            for target, buffer in {(home[s], ref.of(task.microbatch)): None for ref, s in sends}:
                if target != source:
                    yield _Transfer(
                        source=source,
                        target=target,
                        made=number,
                        read=read[target, buffer],
                        seconds=seconds.pop(target, 0.0),
                        buffer=buffer,
                    )
