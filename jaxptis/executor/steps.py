"""The steps that a pipeline can take: gradients, training, evaluation, and making its state."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxptis.executor.compiled import Compiler
from jaxptis.executor.draft import Copies, Draft, Homes
from jaxptis.executor.emit_tasks import emit_tasks
from jaxptis.executor.executable import Buffer, Executable
from jaxptis.executor.memory import DeviceMemory, predict_memory
from jaxptis.executor.programs import (
    INDEX,
    Aval,
    BatchLeaf,
    results_program,
    stage_program,
    zeros_program,
)
from jaxptis.executor.stage_tasks import (
    KINDS,
    MICROBATCH,
    constant,
    gradient_sum,
    result,
    stage_program_name,
    task_programs,
)
from jaxptis.executor.tasks import TaskPrograms
from jaxptis.performance import Costs, simulate
from jaxptis.plan import Plan
from passes import jaxprs
from passes.boxes import Pieces, assemble, whole
from passes.differentiate import accumulator_dtype
from passes.jaxprs import Jaxpr
from passes.split_update import Tied, split_by_device
from passes.split_values import split_values, unroll_split_scans
from passes.stages import LOSS, Role, StageGradient, StageProgram, Stages


class Analysis(Protocol):
    """What a step must know of the loss function; `jaxptis.compile.Analysis` is one."""

    @property
    def costs(self) -> Costs: ...
    @property
    def batch(self) -> tuple[BatchLeaf, ...]: ...
    @property
    def result_axes(self) -> tuple[int | None, ...]: ...


class Pipeline(Protocol):
    """What a step is made from; `jaxptis.compile.Pipeline` is one."""

    @property
    def analysis(self) -> Analysis: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def stages(self) -> Stages: ...
    @property
    def gradients(self) -> tuple[StageGradient, ...]: ...
    @property
    def programs(self) -> Mapping[tuple[int, str], StageProgram]: ...
    @property
    def homes(self) -> tuple[Homes, ...]: ...


def param_copies(pipeline: Pipeline) -> Copies:
    """Return where the parameters live."""
    avals = jaxprs.avals(pipeline.stages.program.param_vars)
    return Copies(homes=pipeline.homes, prefix="param", avals=tuple(avals))


def batch_copies(pipeline: Pipeline) -> Copies:
    """Return which devices read each leaf of the batch."""
    readers: list[set[int]] = [set() for _ in pipeline.analysis.batch]
    for stage, placed in zip(pipeline.stages.stages, pipeline.plan.stages, strict=True):
        for i in stage.batch:
            readers[i].add(placed.device)
    return Copies(
        homes=tuple(tuple(sorted(devices)) for devices in readers),
        prefix="batch",
        avals=tuple(leaf.aval for leaf in pipeline.analysis.batch),
    )


def predicted_memory(pipeline: Pipeline, *state: Copies) -> tuple[DeviceMemory, ...]:
    """Return what the plan says of the memory of a step, until its last task ends.

    What follows the tasks, such as an update, may take more.

    Args:
      pipeline: what runs.
      *state: what else lasts: the optimizer's.
    """
    params, batch = param_copies(pipeline), batch_copies(pipeline)
    sums = Copies(
        homes=params.homes,
        prefix="sum",
        avals=tuple(Aval(a.shape, accumulator_dtype(a.dtype)) for a in params.avals),
    )
    resident = [0] * pipeline.plan.num_devices
    for copies in params, batch, sums, *state:
        for (device, _), aval in copies.buffers().items():
            resident[device] += jaxprs.nbytes([aval])
    programs = pipeline.programs
    for device, values in _constants(pipeline).items():
        resident[device] += sum(value.nbytes for value in values)
    tasks = _tasks(pipeline, programs)
    nbytes = {
        ref.name: jaxprs.nbytes([v.aval])
        for key, program in programs.items()
        for refs, values in (
            (tasks[key].reads[-len(program.reads) :], program.jaxpr.invars),
            (tasks[key].writes, program.jaxpr.outvars),
        )
        for ref, v in zip(refs, values, strict=True)
    }
    nbytes[MICROBATCH.name] = jaxprs.nbytes([INDEX])
    return predict_memory(pipeline.plan, tasks, nbytes, resident)


def result_homes(pipeline: Pipeline, compiler: Compiler) -> list[Homes]:
    """Return where each result is: where it is made, and on a device of every other process."""
    made = {
        r: placed.device
        for stage, placed in zip(pipeline.stages.stages, pipeline.plan.stages, strict=True)
        for r in stage.results
    }
    return [compiler.one_per_process(made[r]) for r in sorted(made)]


def evaluation(pipeline: Pipeline, compiler: Compiler) -> Executable:
    """Return the forward: parameters and batch in, results out."""
    plan = pipeline.plan.forward_only()
    draft = Draft(len(compiler.devices))
    stages = pipeline.stages.stages
    _bind_constants(draft, plan, [stage.constants for stage in stages])
    programs = {(s, "F"): stage.program() for s, stage in enumerate(stages)}
    _add_tasks(draft, pipeline, plan, programs)
    return draft.executable(compiler, "an evaluation", _share_results(draft, pipeline, compiler))


def gradient_step(pipeline: Pipeline, compiler: Compiler) -> tuple[Executable, tuple[Homes, ...]]:
    """Return the gradient, and where that of each leaf of the parameters is put.

    Parameters and batch in; results and gradients, of whole leaves, out.
    """
    draft = _draft_gradient(pipeline, compiler)
    params = param_copies(pipeline)
    program = pipeline.stages.program

    def finish(sums: Any) -> Any:
        totals = _totals(sums, params)
        return [
            _joined([totals[p] for p in parts], boxes)
            for parts, boxes in zip(program.leaves, program.pieces, strict=True)
        ]

    jaxpr, _, _ = jaxprs.trace(finish, _sum_avals(params))
    split = split_by_device(
        jaxprs.inline(jaxpr)[0],
        input_homes=[(device,) for homes in params.homes for device in homes],
        # A leaf in parts is put together where most of it is.
        output_homes=[
            params.homes[parts[0]][:1] if len(parts) == 1 else None for parts in program.leaves
        ],
    )
    grads = draft.split(split, "finish", _sum_names(params))
    owned = [(homes[0], buffer) for buffer, homes in grads]
    results = _share_results(draft, pipeline, compiler)
    executable = draft.executable(compiler, "a gradient", [*results, *owned])
    return executable, tuple(homes for _, homes in grads)


def train_step(
    pipeline: Pipeline,
    compiler: Compiler,
    optimizer: optax.GradientTransformation,
    params_tree: Any,
) -> tuple[Executable, Copies, tuple[Pieces, ...]]:
    """Return a whole step, which consumes its parameters and state.

    Parameters, optimizer state and batch in; results, parameters and optimizer state out.

    Returns:
      The step, where the parts of the state live, and the pieces of each leaf of the state.
    """
    draft = _draft_gradient(pipeline, compiler)
    params = param_copies(pipeline)
    update, constants, pieces = _update(pipeline, optimizer, params_tree)
    num_state = sum(map(len, pieces))
    state_avals = tuple(jaxprs.avals(update.invars[len(update.invars) - num_state :]))

    def step(fixed: Any, sums: Any, params_leaves: Any, state: Any) -> Any:
        grads = _totals(sums, params)
        return jaxprs.evaluate(update, [*fixed, *grads, *params_leaves, *state])

    sums = _sum_names(params)
    fixed = jaxprs.avals(update.invars[: len(constants)])
    jaxpr, _, _ = jaxprs.trace(
        step, fixed, _sum_avals(params), list(params.avals), list(state_avals)
    )
    jaxpr, _ = jaxprs.inline(jaxpr)
    # The state is overwritten in the next step, so no two leaves may share an array.
    jaxpr = jaxprs.with_own_outputs(jaxprs.drop_dead_equations(jaxpr), also_inputs=False)
    first_state = len(constants) + len(sums) + len(params.homes)
    split = split_by_device(
        jaxpr,
        input_homes=[
            *[None] * len(constants),
            *((device,) for homes in params.homes for device in homes),
            *params.homes,
            *[None] * len(state_avals),
        ],
        output_homes=[
            *params.homes,
            *(Tied(first_state + i) for i in range(len(state_avals))),
        ],
    )
    names = [
        *(f"update.constant{k}" for k in range(len(constants))),
        *sums,
        *(f"param{p}" for p in range(len(params.homes))),
        *(f"state{i}" for i in range(len(state_avals))),
    ]
    draft.constants_of_split(split, names, constants)
    placed = draft.split(split, "update", names)
    state = Copies(
        homes=tuple(homes for _, homes in placed[len(params.homes) :]),
        prefix="state",
        avals=state_avals,
    )
    draft.inputs = {**params.buffers(), **state.buffers(), **batch_copies(pipeline).buffers()}
    outputs = [(device, buffer) for buffer, homes in placed for device in homes]
    consumed = [*params.buffers(), *state.buffers()]
    results = _share_results(draft, pipeline, compiler)
    executable = draft.executable(compiler, "a training step", [*results, *outputs], consumed)
    return executable, state, pieces


def _update(
    pipeline: Pipeline, optimizer: optax.GradientTransformation, params_tree: Any
) -> tuple[Jaxpr, list[Any], tuple[Pieces, ...]]:
    """Return the optimizer's update of parts, its constants, and the pieces of each state leaf.

    It takes the constants, and the parts of gradients, parameters and state; it returns the parts
    of the next parameters and state.
    """
    program = pipeline.stages.program
    structure = jax.tree.structure(params_tree)
    state_tree = jax.eval_shape(optimizer.init, params_tree)

    def update(grads: Any, params_leaves: Any, state: Any) -> Any:
        tree = jax.tree.unflatten(structure, params_leaves)
        updates, state = optimizer.update(jax.tree.unflatten(structure, grads), state, tree)
        return jax.tree.leaves(optax.apply_updates(tree, updates)), state

    leaves = list(program.leaf_avals)
    jaxpr, closed_over, _ = jaxprs.trace(update, leaves, leaves, state_tree)
    jaxpr, inlined = jaxprs.inline(jaxpr)
    constants = [*inlined, *closed_over]
    num_state = len(jax.tree.leaves(state_tree))
    before = len(jaxpr.invars) - num_state
    split = split_values(
        jaxprs.drop_dead_equations(jaxpr),
        inputs=[
            *(_uncut(aval) for aval in jaxprs.avals(jaxpr.invars[: len(constants)])),
            *program.pieces,
            *program.pieces,
            *[None] * num_state,
        ],
        outputs=[*program.pieces, *(Tied(before + i) for i in range(num_state))],
    )
    return split.jaxpr, constants, split.inputs[before:]


def _uncut(aval: Aval) -> Pieces:
    return (whole(aval.shape),)


def initializer(
    compiler: Compiler,
    fun: Callable[..., Any],
    args: Sequence[Any],
    homes: Sequence[Homes],
    *,
    given: Sequence[Pieces],
    wanted: Sequence[Pieces],
) -> tuple[Executable, tuple[Homes, ...]]:
    """Return a program that makes each part of `fun(*args)`, an array of its own, on its devices.

    Args:
      compiler: for the devices.
      fun: returns a pytree.
      args: pytrees of types.
      homes: where each part is wanted.
      given: the pieces of each leaf of `args`.
      wanted: the pieces of each leaf of the result.

    Returns:
      The program, which takes the parts of `args` on the devices that need them, and for each
      part these devices.
    """
    jaxpr, closed_over, _ = jaxprs.trace(fun, *args)
    jaxpr, inlined = jaxprs.inline(jaxpr, also_rules=True)
    jaxpr, unrolled = unroll_split_scans(jaxprs.drop_dead_equations(jaxpr), wanted)
    constants = [*unrolled, *inlined, *closed_over]
    fixed = [_uncut(aval) for aval in jaxprs.avals(jaxpr.invars[: len(constants)])]
    jaxpr = split_values(jaxpr, inputs=[*fixed, *given], outputs=wanted).jaxpr
    jaxpr = jaxprs.with_own_outputs(jaxprs.drop_dead_equations(jaxpr), also_inputs=True)
    avals = jaxprs.avals(jaxpr.invars[len(constants) :])
    split = split_by_device(jaxpr, input_homes=[None] * len(jaxpr.invars), output_homes=list(homes))
    names = [
        *(f"init.constant{k}" for k in range(len(constants))),
        *(f"argument{i}" for i in range(len(avals))),
    ]
    draft = Draft(len(compiler.devices))
    draft.constants_of_split(split, names, constants)
    needed = Copies(
        homes=tuple(place.homes for place in split.inputs[len(constants) :]),
        prefix="argument",
        avals=tuple(avals),
    )
    draft.inputs = needed.buffers()
    placed = draft.split(split, "init", names)
    outputs = [(device, buffer) for buffer, at in placed for device in at]
    return draft.executable(compiler, "making a state", outputs), needed.homes


def _totals(sums: Sequence[Sequence[Any]], params: Copies) -> list[Any]:
    """Add up the gradient sums of each parameter, one from each device that holds it."""
    return [
        functools.reduce(operator.add, copies).astype(aval.dtype)
        for copies, aval in zip(sums, params.avals, strict=True)
    ]


def _joined(parts: Sequence[Any], boxes: Pieces) -> Any:
    """Put a leaf together from its parts."""
    if len(parts) == 1:
        return parts[0]
    stops = [max(stop for _, stop in spans) for spans in zip(*boxes, strict=True)]
    return assemble(
        whole(stops),
        list(zip(boxes, parts, strict=True)),
        cut=lambda part, box: part[tuple(slice(start, stop) for start, stop in box)],
        join=jnp.concatenate,
    )


def _sum_avals(params: Copies) -> list[list[Aval]]:
    return [
        [Aval(aval.shape, accumulator_dtype(aval.dtype))] * len(homes)
        for aval, homes in zip(params.avals, params.homes, strict=True)
    ]


def _sum_names(params: Copies) -> list[str]:
    return [gradient_sum(p, d) for p, homes in enumerate(params.homes) for d in homes]


def _draft_gradient(pipeline: Pipeline, compiler: Compiler) -> Draft:
    """Start a step with the tasks of the plan; its results and the sums of gradients are ready."""
    plan = pipeline.plan
    draft = Draft(len(compiler.devices))
    _add_zeros(draft, pipeline)
    _bind_constants(draft, plan, [gradient.constants for gradient in pipeline.gradients])
    # The loss of the step is a mean, so each microbatch's counts for 1/M.
    dtype = jaxprs.avals(pipeline.stages.program.jaxpr.outvars)[LOSS].dtype
    share = np.asarray(1 / plan.num_microbatches, dtype)
    for stage, placed in zip(pipeline.stages.stages, plan.stages, strict=True):
        if stage.makes_loss:
            draft.constants[placed.device, "d_loss"] = share
    _add_tasks(draft, pipeline, plan, pipeline.programs)
    return draft


def _tasks(pipeline: Pipeline, programs: Mapping[tuple[int, str], StageProgram]) -> TaskPrograms:
    homes = [placed.device for placed in pipeline.plan.stages]
    return task_programs(pipeline.stages, programs, homes=homes, batch=pipeline.analysis.batch)


def _constants(pipeline: Pipeline) -> dict[int, list[Any]]:
    """Return the arrays that the programs on each device close over."""
    read = {
        (s, x.index)
        for (s, _), program in pipeline.programs.items()
        for x in program.reads
        if x.role == Role.CONSTANT
    }
    found: dict[int, list[Any]] = {}
    for s, k in sorted(read):
        value = pipeline.gradients[s].constants[k]
        found.setdefault(pipeline.plan.stages[s].device, []).append(value)
    return found


def _bind_constants(draft: Draft, plan: Plan, values: Sequence[Sequence[Any]]) -> None:
    """Bind what each stage closes over, and the indices of the microbatches."""
    for s, (placed, closed_over) in enumerate(zip(plan.stages, values, strict=True)):
        for k, value in enumerate(closed_over):
            draft.constants[placed.device, constant(s, k)] = value
        for m in range(plan.num_microbatches):
            draft.constants[placed.device, MICROBATCH.of(m)] = jnp.asarray(m, INDEX.dtype)


def _add_zeros(draft: Draft, pipeline: Pipeline) -> None:
    params = param_copies(pipeline)
    for device in range(pipeline.plan.num_devices):
        held = [p for p, homes in enumerate(params.homes) if device in homes]
        if held:
            name = f"zeros.device{device}"
            draft.specs[name] = zeros_program([params.avals[p] for p in held], device=device)
            draft.rows.run(device, name, [], [gradient_sum(p, device) for p in held])


def _add_tasks(
    draft: Draft,
    pipeline: Pipeline,
    plan: Plan,
    programs: Mapping[tuple[int, str], StageProgram],
) -> None:
    """Add the tasks and what joins their results."""
    homes = [placed.device for placed in plan.stages]
    for (s, kind), program in programs.items():
        draft.specs[stage_program_name(s, kind)] = stage_program(
            KINDS[kind], program, device=homes[s], batch=pipeline.analysis.batch
        )
    draft.inputs = {**param_copies(pipeline).buffers(), **batch_copies(pipeline).buffers()}
    timeline = simulate(plan, pipeline.analysis.costs)
    emit_tasks(draft.rows, plan, timeline, _tasks(pipeline, programs))

    count = plan.num_microbatches
    avals = jaxprs.avals(pipeline.stages.program.jaxpr.outvars)
    for device in range(plan.num_devices):
        held = [
            r
            for stage, home in zip(pipeline.stages.stages, homes, strict=True)
            if home == device
            for r in stage.results
        ]
        if held:
            name = f"results.device{device}"
            kinds = [(avals[r], pipeline.analysis.result_axes[r]) for r in held]
            draft.specs[name] = results_program(kinds, count, device=device)
            draft.rows.run(
                device,
                name,
                [f"{result(r)}.{m}" for r in held for m in range(count)],
                [result(r) for r in held],
            )


def _share_results(draft: Draft, pipeline: Pipeline, compiler: Compiler) -> list[Buffer]:
    """Add the transfers that bring the results to all processes; returns where they are then."""
    homes = result_homes(pipeline, compiler)
    return draft.share({result(r): devices for r, devices in enumerate(homes)})
