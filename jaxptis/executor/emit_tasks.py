"""From a plan and what its tasks cost to the instruction lists of the devices.

A transfer blocks both devices until both are there; `performance.meetings` says where it stands.
"""

from jaxptis.executor.instructions import Rows
from jaxptis.executor.tasks import TaskPrograms
from jaxptis.performance.meetings import Crossing, sequence_of
from jaxptis.performance.task_costs import TaskCosts
from jaxptis.plan import Plan


def emit_tasks(rows: Rows, plan: Plan, costs: TaskCosts, programs: TaskPrograms) -> None:
    """Append the tasks of the plan and the transfers between them.

    When something crosses by the costs, all that its source has for the target by then goes. What
    skips stages may have no such chance: then it goes before the first task that reads it.
    """
    home = [stage.device for stage in plan.stages]
    held: dict[tuple[int, str], int] = {}  # target and buffer -> source
    for item in sequence_of(plan, costs):
        if isinstance(item, Crossing):
            ready = [
                name
                for (target, name), source in held.items()
                if (source, target) == (item.source, item.target)
            ]
            for name in ready:
                rows.transfer(held.pop((item.target, name)), item.target, name)
            continue
        device = home[item.stage]
        program = programs.get((item.stage, item.kind))
        if program is None:
            continue
        reads = [ref.of(item.microbatch) for ref in program.reads]
        for name in reads:
            if (device, name) in held:
                rows.transfer(held.pop((device, name)), device, name)
        writes = [ref.of(item.microbatch) for ref in program.writes]
        rows.run(device, program.name, reads, writes, item)
        for ref, stage in program.sends:
            if home[stage] != device:
                held[home[stage], ref.of(item.microbatch)] = device
    assert not held, held
