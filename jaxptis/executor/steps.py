"""The steps that a pipeline can take: gradients, training, evaluation, and making its state."""

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
from jaxptis.executor.programs import (
    INDEX,
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
from jaxptis.performance import Costs, simulate
from jaxptis.plan import Plan
from passes import jaxprs
from passes.differentiate import accumulator_dtype
from passes.split_update import Tied, split_by_device
from passes.stages import LOSS, StageGradient, StageProgram, Stages


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


def evaluation(pipeline: Pipeline, compiler: Compiler) -> Executable:
    """Return the forward: parameters and batch in, results out."""
    plan = pipeline.plan.forward_only()
    draft = Draft(plan.num_devices)
    stages = pipeline.stages.stages
    _bind_constants(draft, plan, [stage.constants for stage in stages])
    programs = {(s, "F"): stage.program() for s, stage in enumerate(stages)}
    results = _add_tasks(draft, pipeline, plan, programs)
    return draft.executable(compiler, results)


def gradient_step(pipeline: Pipeline, compiler: Compiler) -> Executable:
    """Return the gradient: parameters and batch in, results and gradients out."""
    draft, results = _draft_gradient(pipeline)
    params = param_copies(pipeline)
    copies = [jax.ShapeDtypeStruct(a.shape, accumulator_dtype(a.dtype)) for a in params.avals]

    def finish(sums: Any) -> Any:
        return [_total(s, aval.dtype) for s, aval in zip(sums, params.avals, strict=True)]

    per_home = [[aval] * len(homes) for aval, homes in zip(copies, params.homes, strict=True)]
    jaxpr, _, _ = jaxprs.trace(finish, per_home)
    split = split_by_device(
        jaxprs.inline(jaxpr)[0],
        input_homes=[(device,) for homes in params.homes for device in homes],
        output_homes=[homes[:1] for homes in params.homes],
    )
    grads = draft.split(split, "finish", _sum_names(params))
    owned = [(homes[0], buffer) for buffer, homes in grads]
    return draft.executable(compiler, [*results, *owned])


def train_step(
    pipeline: Pipeline,
    compiler: Compiler,
    optimizer: optax.GradientTransformation,
    params_tree: Any,
) -> tuple[Executable, Copies]:
    """Return a whole step, which consumes its parameters and state, and where the state lives.

    Parameters, optimizer state and batch in; results, parameters and optimizer state out.
    """
    draft, results = _draft_gradient(pipeline)
    params = param_copies(pipeline)
    state_tree = jax.eval_shape(optimizer.init, params_tree)
    structure = jax.tree.structure(params_tree)
    per_home = [
        [jax.ShapeDtypeStruct(aval.shape, accumulator_dtype(aval.dtype))] * len(homes)
        for aval, homes in zip(params.avals, params.homes, strict=True)
    ]

    def update(sums: Any, params_leaves: Any, state: Any) -> Any:
        grads = [_total(s, a.dtype) for s, a in zip(sums, params_leaves, strict=True)]
        tree = jax.tree.unflatten(structure, params_leaves)
        updates, state = optimizer.update(jax.tree.unflatten(structure, grads), state, tree)
        return jax.tree.leaves(optax.apply_updates(tree, updates)), state

    jaxpr, closed_over, _ = jaxprs.trace(update, per_home, list(params.avals), state_tree)
    jaxpr, inlined = jaxprs.inline(jaxpr)
    # The state is overwritten in the next step, so no two leaves may share an array.
    jaxpr = jaxprs.with_own_outputs(jaxprs.drop_dead_equations(jaxpr), also_inputs=False)
    constants = [*inlined, *closed_over]
    state_avals = tuple(jax.tree.leaves(state_tree))
    sums = _sum_names(params)
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
    return draft.executable(compiler, [*results, *outputs], consumed), state


def initializer(
    compiler: Compiler, fun: Callable[..., Any], args: Sequence[Any], homes: Sequence[Homes]
) -> tuple[Executable, tuple[Homes, ...]]:
    """Return a program that makes each leaf of `fun(*args)`, an array of its own, on its devices.

    Args:
      compiler: for the devices.
      fun: returns a pytree with as many leaves as `homes`.
      args: pytrees of types.
      homes: where each leaf is wanted.

    Returns:
      The program, which takes the leaves of `args` on the devices that need them, and for each
      leaf these devices.
    """
    jaxpr, closed_over, _ = jaxprs.trace(fun, *args)
    jaxpr, inlined = jaxprs.inline(jaxpr)
    jaxpr = jaxprs.with_own_outputs(jaxprs.drop_dead_equations(jaxpr), also_inputs=True)
    constants = [*inlined, *closed_over]
    avals = jax.tree.leaves(list(args))
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
    return draft.executable(compiler, outputs), needed.homes


def _total(copies: Sequence[Any], dtype: Any) -> Any:
    """Add up the gradient sums of one parameter, one from each device that holds it."""
    total = copies[0]
    for copy in copies[1:]:
        total = total + copy
    return total.astype(dtype)


def _sum_names(params: Copies) -> list[str]:
    return [gradient_sum(p, d) for p, homes in enumerate(params.homes) for d in homes]


def _draft_gradient(pipeline: Pipeline) -> tuple[Draft, list[Buffer]]:
    """Start a step with the tasks of the plan; its results and the sums of gradients are ready."""
    plan = pipeline.plan
    draft = Draft(plan.num_devices)
    _add_zeros(draft, pipeline)
    _bind_constants(draft, plan, [gradient.constants for gradient in pipeline.gradients])
    # The loss of the step is a mean, so each microbatch's counts for 1/M.
    dtype = jaxprs.avals(pipeline.stages.program.jaxpr.outvars)[LOSS].dtype
    share = np.asarray(1 / plan.num_microbatches, dtype)
    for stage, placed in zip(pipeline.stages.stages, plan.stages, strict=True):
        if stage.makes_loss:
            draft.constants[placed.device, "d_loss"] = share
    return draft, _add_tasks(draft, pipeline, plan, pipeline.programs)


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
) -> list[Buffer]:
    """Add the tasks and what joins their results; returns the results of the step."""
    homes = [placed.device for placed in plan.stages]
    for (s, kind), program in programs.items():
        draft.specs[stage_program_name(s, kind)] = stage_program(
            KINDS[kind], program, device=homes[s], batch=pipeline.analysis.batch
        )
    draft.inputs = {**param_copies(pipeline).buffers(), **batch_copies(pipeline).buffers()}
    tasks = task_programs(pipeline.stages, programs, homes=homes, batch=pipeline.analysis.batch)
    emit_tasks(draft.rows, plan, simulate(plan, pipeline.analysis.costs), tasks)

    count = plan.num_microbatches
    avals = jaxprs.avals(pipeline.stages.program.jaxpr.outvars)
    where: dict[int, int] = {}
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
            where.update(dict.fromkeys(held, device))
    return [(where[r], result(r)) for r in range(len(avals))]
