"""From a plan and what its tasks cost to the instruction lists of the devices.

A transfer blocks both devices until both are there; `performance.meetings` says where it stands.
"""

from jaxptis.executor.instructions import Rows
from jaxptis.executor.tasks import TaskPrograms
from jaxptis.performance.meetings import Crossing, sequence_of
from jaxptis.performance.task_costs import TaskCosts
from jaxptis.plan import Plan, Task


def emit_tasks(rows: Rows, plan: Plan, costs: TaskCosts, programs: TaskPrograms) -> None:
    """Append the tasks of the plan and the transfers between them.

    What a task sends goes to the stage after its own, or before; see `passes.hand_on`.
    """
    home = [stage.device for stage in plan.stages]
    held: dict[Task, list[str]] = {}  # what tasks made for other devices
    for item in sequence_of(plan, costs):
        if isinstance(item, Crossing):
            for name in held.pop(plan.schedule[item.source][item.made], ()):
                rows.transfer(item.source, item.target, name)
            continue
        device = home[item.stage]
        program = programs.get((item.stage, item.kind))
        if program is None:
            continue
        reads = [ref.of(item.microbatch) for ref in program.reads]
        writes = [ref.of(item.microbatch) for ref in program.writes]
        rows.run(device, program.name, reads, writes, item)
        if program.sends and home[item.stage + (1 if item.kind == "F" else -1)] != device:
            held[item] = [ref.of(item.microbatch) for ref in program.sends]
    assert not any(held.values()), held
