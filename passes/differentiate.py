"""From a stage to its forward and backward programs.

Each stage is differentiated by itself with `jax.vjp`, so custom rules stay in force. The jaxpr of
forward and gradient together is then sliced in two, at the values that `choose_saved` saves. A
stage that recomputes all saves nothing: its backward starts from the inputs of the stage.
"""

import dataclasses
from collections.abc import Container, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from passes import jaxprs
from passes.jaxprs import Jaxpr, Var
from passes.saved_values import CHEAP, FORM, choose_saved
from passes.stages import Operand, Role, StageGradient, Stages, slice_program

Recompute = Literal["none", "cheap", "all"]
AGAIN = {"none": FORM, "cheap": CHEAP}
Written = tuple[Operand, Var | jaxprs.Literal]


def differentiate(
    stages: Stages, *, recompute: Sequence[Recompute] | None = None
) -> tuple[StageGradient, ...]:
    """Return the forward and backward programs of every stage.

    Args:
      stages: what to differentiate.
      recompute: what each stage's backward computes again; what is cheap if not given.

    Raises:
      ValueError: JAX cannot differentiate the model in reverse, for example through a while loop.
    """
    recompute = recompute or ["cheap"] * len(stages.stages)
    return tuple(
        differentiate_stage(stages, index, recompute=each) for index, each in enumerate(recompute)
    )


def accumulator_dtype(dtype: Any) -> Any:
    """Return the dtype in which gradients of parameters of `dtype` are summed: at least float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Joint:
    """Forward and gradient of a stage in one jaxpr, and what its inputs and results are."""

    jaxpr: Jaxpr
    constants: tuple[Any, ...]
    reads: dict[Var, Operand]
    outputs: list[Written]  # crossings and results
    d_inputs: list[Written]
    sums: list[Written]

    def inputs(self, *roles: Role) -> list[Var]:
        return [v for v, operand in self.reads.items() if operand.role in roles]


def differentiate_stage(stages: Stages, index: int, *, recompute: Recompute) -> StageGradient:
    """Return the forward and backward programs of a single stage; see `differentiate`."""
    stage = stages.stages[index]
    joint = _trace_joint(stages, index)
    moving = jaxprs.dependents(joint.jaxpr, joint.inputs(Role.COTANGENT, Role.D_LOSS))
    # JAX gives a zero gradient as a Literal, or as a value that depends on no cotangent.
    sums = [(operand, v) for operand, v in joint.sums if isinstance(v, Var) and v in moving]
    gradient = [*joint.d_inputs, *sums]
    inputs = joint.inputs(Role.CROSSING)
    saved = inputs if recompute == "all" else _saved(joint, moving, gradient, AGAIN[recompute])
    outputs = {v: operand for operand, v in joint.outputs if operand.role == Role.CROSSING}
    new = [v for v in saved if v not in inputs and v not in outputs]
    named = {v: Operand(Role.SAVED, k) for k, v in enumerate(new)}
    operands = joint.reads | outputs | named
    held = joint.inputs(Role.CONSTANT, Role.PARAM, Role.BATCH)
    # The sums stand last: see `donations`.
    arriving = joint.inputs(Role.COTANGENT, Role.D_LOSS, Role.SUM)
    return StageGradient(
        stage=stage,
        constants=joint.constants,
        forward=slice_program(
            joint.jaxpr,
            {v: operands[v] for v in (*held, *inputs)},
            [*joint.outputs, *((operand, v) for v, operand in named.items())],
        ),
        backward=slice_program(
            joint.jaxpr, {v: operands[v] for v in (*held, *saved, *arriving)}, gradient
        ),
    )


def _trace_joint(stages: Stages, index: int) -> _Joint:
    stage = stages.stages[index]
    crossings = stages.crossings
    given = stage.program().reads
    avals = dict(zip(given, jaxprs.avals(stage.forward.invars), strict=True))
    moved = [Operand(Role.CROSSING, c) for c in stage.inputs if crossings[c].has_gradient]
    smooth = [crossings[c].has_gradient for c in stage.outputs]
    cotangents = {
        Operand(Role.COTANGENT, c, consumer): crossings[c].aval
        for c in stage.outputs
        if crossings[c].has_gradient
        for consumer in crossings[c].consumers
    }
    if stage.makes_loss:
        cotangents[Operand(Role.D_LOSS)] = stages.program.jaxpr.outvars[0].aval
    params = [Operand(Role.PARAM, p) for p in stage.params]
    sums = {
        Operand(Role.SUM, p): jax.ShapeDtypeStruct(aval.shape, accumulator_dtype(aval.dtype))
        for p, aval in zip(stage.params, (avals[p] for p in params), strict=True)
    }

    def joint(given_values: Any, d_outputs: Any, totals: Any) -> Any:
        values = dict(zip(given, given_values, strict=True))

        def forward(param_values: Any, moved_values: Any) -> Any:
            own = values | dict(zip(params, param_values, strict=True))
            own |= dict(zip(moved, moved_values, strict=True))
            outs = jaxprs.evaluate(stage.forward, [own[operand] for operand in given])
            differentiated = [y for y, s in zip(outs, smooth, strict=False) if s]
            if stage.makes_loss:  # the loss is the first of the results
                differentiated.append(outs[len(stage.outputs)])
            return differentiated, outs

        _, gradient, outs = jax.vjp(
            forward, [values[p] for p in params], [values[x] for x in moved], has_aux=True
        )
        arrived = dict(zip(cotangents, d_outputs, strict=True))
        d_params, d_inputs = gradient(_sum_consumers(arrived))
        added = [t + d.astype(t.dtype) for t, d in zip(totals, d_params, strict=True)]
        return outs, d_inputs, added

    plain = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cotangents.values()]
    try:
        jaxpr, new, _ = jaxprs.trace(joint, list(avals.values()), plain, list(sums.values()))
    except ValueError as error:
        _explain_while_loop(stage.forward, error)
        raise
    jaxpr, inlined = jaxprs.inline(jaxpr, also_rules=True)  # they have been applied by now
    jaxpr = jaxprs.drop_dead_equations(jaxpr)
    constants = (*stage.constants, *inlined, *new)
    added_constants = range(len(stage.constants), len(constants))
    operands = [
        *(Operand(Role.CONSTANT, k) for k in added_constants),
        *given,
        *cotangents,
        *sums,
    ]
    outputs = stage.program().writes
    d_inputs = [Operand(Role.COTANGENT, x.index, index) for x in moved]
    written = list(zip((*outputs, *d_inputs, *sums), jaxpr.outvars, strict=True))
    return _Joint(
        jaxpr=jaxpr,
        constants=constants,
        reads=dict(zip(jaxpr.invars, operands, strict=True)),
        outputs=written[: len(outputs)],
        d_inputs=written[len(outputs) : len(outputs) + len(d_inputs)],
        sums=written[len(outputs) + len(d_inputs) :],
    )


def _explain_while_loop(forward: Jaxpr, error: ValueError) -> None:
    """Raise a plainer error, with its line, if it is a while loop that JAX cannot differentiate."""
    if "Reverse-mode differentiation does not work" not in str(error):
        return
    loops = [e for e in jaxprs.equations(forward) if e.primitive.name == "while"]
    places = " or ".join(dict.fromkeys(map(jaxprs.located, loops)))
    raise ValueError(
        f"the gradient flows through {places}, a loop of which the number of iterations "
        "is not known before it runs; use jax.lax.scan, or jax.lax.fori_loop with constant bounds, "
        "or jax.lax.stop_gradient of what the loop reads"
    ) from error


def _sum_consumers(cotangents: dict[Operand, Any]) -> list[Any]:
    """Add up the cotangents of each crossing; that of the loss, if any, stays last."""
    sums: dict[tuple[Role, int], Any] = {}
    for operand, value in cotangents.items():
        key = operand.role, operand.index
        sums[key] = sums[key] + value if key in sums else value
    return list(sums.values())


def _saved(
    joint: _Joint, moving: set[Var], gradient: Sequence[Written], again: Container[str]
) -> list[Var]:
    known = [e for e in joint.jaxpr.eqns if moving.isdisjoint(e.outvars)]
    wanted = {v for _, v in gradient if isinstance(v, Var)} - moving
    for eqn in joint.jaxpr.eqns:
        if not moving.isdisjoint(eqn.outvars):
            wanted.update(v for v in jaxprs.reads(eqn) if v not in moving)
    at_hand = joint.inputs(Role.CONSTANT, Role.PARAM, Role.BATCH, Role.SUM)
    inputs = joint.inputs(Role.CROSSING)
    return choose_saved(known, at_hand=at_hand, given=inputs, wanted=wanted, again=again)
