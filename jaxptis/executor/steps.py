"""The steps that a pipeline can take: gradients, training and evaluation."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxptis.executor.compiled import CompiledProgram, Compiler
from jaxptis.executor.draft import Copies, Draft, Homes
from jaxptis.executor.emit_tasks import emit_tasks
from jaxptis.executor.executable import Buffer, Executable, donated_inputs
from jaxptis.executor.holdings import (
    Pipeline,
    batch_copies,
    param_copies,
    result_homes,
    tasks_of,
)
from jaxptis.executor.programs import (
    INDEX,
    Aval,
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
)
from jaxptis.performance.task_costs import task_costs
from jaxptis.plan import Plan
from passes import jaxprs
from passes.boxes import Pieces, assemble, whole
from passes.differentiate import accumulator_dtype
from passes.jaxprs import Jaxpr
from passes.split_update import Tied, split_by_device
from passes.split_values import split_values
from passes.stages import LOSS, StageProgram


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
    *,
    like: Executable | None = None,
) -> tuple[Executable, Copies, tuple[Pieces, ...]]:
    """Return a whole step, which consumes its parameters and state.

    Parameters, optimizer state and batch in; results, parameters and optimizer state out. It runs
    the programs of `like`, the step in another order, if that is given.

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
    executable = draft.executable(compiler, "a training step", [*results, *outputs], consumed, like)
    return executable, state, pieces


def stage_programs(pipeline: Pipeline, compiler: Compiler) -> dict[str, CompiledProgram]:
    """Return what the tasks run, by name, each compiled when it is looked at."""
    draft = _draft_gradient(pipeline, compiler)
    donated = donated_inputs(draft.rows, draft.specs, {*draft.inputs, *draft.constants})
    names = [stage_program_name(s, kind) for s, kind in pipeline.programs]
    return {name: compiler.program(draft.specs[name], donated[name]) for name in names}


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
    costs = task_costs(plan, pipeline.analysis.costs, pipeline.analysis.cluster)
    emit_tasks(draft.rows, plan, costs, tasks_of(pipeline, programs))

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
