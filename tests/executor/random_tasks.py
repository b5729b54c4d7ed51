"""What tasks might run, drawn at random for a plan; and the instruction lists of such a step."""

from jaxptis.executor.emit_tasks import emit_tasks
from jaxptis.executor.instructions import Rows
from jaxptis.executor.tasks import Ref, TaskProgram
from jaxptis.performance import Costs, LayerCost
from jaxptis.performance.task_costs import task_costs


def random_costs(rng, plan):
    """Return costs of the plan's layers; some are nothing at all."""

    def seconds():
        return rng.choice([0.0, 1.0, rng.random()])

    return Costs(
        tuple(
            LayerCost(
                name=name,
                forward_s=seconds(),
                backward_s=seconds(),
                input_grad_s=seconds(),
                weight_grad_s=seconds(),
            )
            for name in plan.layers
        )
    )


def random_programs(rng, plan):
    """Return programs by stage and kind: a chain of stages, with one or two values from each."""
    makers = [s for s in range(plan.num_stages - 1) for _ in range(rng.randint(1, 2))]
    kinds = {(task.stage, task.kind) for row in plan.schedule for task in row}
    programs = {}
    for s in range(plan.num_stages):
        for kind, program in _stage(rng, s, plan.stages[s].device, makers).items():
            if (s, kind) in kinds:
                programs[s, kind] = program
    return programs


def _stage(rng, s, device, makers):
    """Return what the tasks of a stage run; the first stage has no input gradient."""

    def some(what):
        return [Ref(f"stage{s}.{what}{k}", True) for k in range(rng.randint(0, 2))]

    inputs = [c for c, maker in enumerate(makers) if maker == s - 1]
    outputs = [Ref(f"x{c}", True) for c, maker in enumerate(makers) if maker == s]
    d_inputs = [Ref(f"d{c}.stage{s}", True) for c in inputs]
    held = [Ref(f"param{s}", False), *(Ref(f"x{c}", True) for c in inputs)]
    d_outputs = [Ref(f"d{c}.stage{s + 1}", True) for c, maker in enumerate(makers) if maker == s]
    early, late, kept = some("early"), some("late"), some("kept")
    total = [Ref(f"sum{s}.device{device}", False)]
    made = [*(outputs or [Ref("result0", True)]), *early, *late]
    whole = ([*held, *early, *late, *d_outputs, *total], [*d_inputs, *total], d_inputs)
    parts = {"F": (held, made, outputs), "B": whole, "W": whole}
    if d_inputs:
        parts["I"] = ([*held, *early, *d_outputs], [*d_inputs, *kept], d_inputs)
        parts["W"] = ([*late, *kept, *d_outputs, *total], total, [])
    return {
        kind: TaskProgram(
            name=f"stage{s}.{kind}", reads=tuple(reads), writes=tuple(writes), sends=tuple(sends)
        )
        for kind, (reads, writes, sends) in parts.items()
    }


def write_rows(plan, programs, costs):
    """Return the lists of a step, what is there at its start, and what is to be left."""
    rows = Rows(plan.num_devices)
    emit_tasks(rows, plan, task_costs(plan, costs, None), programs)
    given = [set() for _ in rows.rows]
    held = [set() for _ in rows.rows]
    for (stage, _), program in programs.items():
        device = plan.stages[stage].device
        lasting = {ref.name for ref in program.reads if not ref.per_microbatch}
        given[device] |= lasting
        held[device] |= lasting
        if any(ref.name == "result0" for ref in program.writes):
            held[device] |= {f"result0.{m}" for m in range(plan.num_microbatches)}
    return rows.free(held), given, held
