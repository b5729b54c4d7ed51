"""The executor's instruction lists for a plan whose stages hand on one buffer each way."""

from jaxptis.cluster import Cluster
from jaxptis.executor.emit_tasks import emit_tasks
from jaxptis.executor.instructions import Rows
from jaxptis.executor.tasks import Ref, TaskProgram
from jaxptis.performance import Costs
from jaxptis.performance.task_costs import task_costs
from jaxptis.plan import Plan


def chain_programs(plan: Plan) -> dict[tuple[int, str], TaskProgram]:
    """Return the programs: stage s makes x{s} for the next stage, and d{s} for the one before."""
    last = plan.num_stages - 1
    kinds = {(task.stage, task.kind) for row in plan.schedule for task in row}
    trains = any(kind != "F" for _, kind in kinds)
    programs = {}
    for s, kind in sorted(kinds):
        x, saved, kept = [Ref(f"x{s - 1}", True)] * (s > 0), Ref(f"saved{s}", True), f"kept{s}"
        d = [Ref(f"d{s + 1}", True)] * (s < last)
        onward = [Ref(f"x{s}", True)] * (s < last)
        back = [Ref(f"d{s}", True)] * (s > 0)
        back_reads = [*x, saved, *d]
        reads, writes, sends = {
            "F": (x, [*[saved] * trains, *onward], onward),
            "B": (back_reads, back, back),
            # The first stage has no input gradient, and leaves all to W.
            "I": (back_reads, [*back, Ref(kept, True)] if s else [], back),
            "W": ([Ref(kept, True)] if s else back_reads, [], []),
        }[kind]
        programs[s, kind] = TaskProgram(
            name=f"stage{s}.{kind}", reads=tuple(reads), writes=tuple(writes), sends=tuple(sends)
        )
    return programs


def emitted(plan: Plan, costs: Costs, cluster: Cluster) -> Rows:
    """Return the lists that the executor runs, without what comes before and after the tasks."""
    rows = Rows(plan.num_devices)
    emit_tasks(rows, plan, task_costs(plan, costs, cluster), chain_programs(plan))
    return rows
