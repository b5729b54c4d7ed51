"""From a stage to its forward and backward programs.

Each stage is differentiated by itself with `jax.vjp`, so custom rules stay in force. The jaxpr of
forward and gradient together is then sliced in two, at the values that `choose_saved` saves.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from passes import jaxprs
from passes.jaxprs import Jaxpr, Literal, Var
from passes.saved_values import choose_saved
from passes.stages import Cotangent, Stage, StageGradient, Stages


def differentiate(stages: Stages) -> tuple[StageGradient, ...]:
    """Return the forward and backward programs of every stage.

    Raises:
      ValueError: JAX cannot differentiate the model in reverse, for example through a while loop.
    """
    return tuple(_differentiate(stages, index) for index in range(len(stages.stages)))


def accumulator_dtype(dtype: Any) -> Any:
    """Return the dtype in which gradients of parameters of `dtype` are summed: at least float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Joint:
    """Forward and gradient of a stage in one jaxpr, and which of its variables are what."""

    jaxpr: Jaxpr
    constants: tuple[Any, ...]
    at_hand: list[Var]  # constants, parameters, batch
    inputs: list[Var]
    cotangents: list[Var]
    outputs: list[Var]
    results: list[Var | Literal]
    d_inputs: list[Var | Literal]
    d_params: list[Var | Literal]


def _differentiate(stages: Stages, index: int) -> StageGradient:
    stage = stages.stages[index]
    d_outputs = tuple(
        Cotangent(crossing=c, consumer=consumer)
        for c in stage.outputs
        if stages.crossings[c].has_gradient
        for consumer in stages.crossings[c].consumers
    )
    d_inputs = tuple(
        Cotangent(crossing=c, consumer=index)
        for c in stage.inputs
        if stages.crossings[c].has_gradient
    )
    joint = _trace_joint(stage, stages, d_outputs)
    after_cotangents = jaxprs.dependents(joint.jaxpr, joint.cotangents)
    # JAX gives a zero gradient as a Literal, or as a value that depends on no cotangent.
    has_gradient = [isinstance(v, Var) and v in after_cotangents for v in joint.d_params]
    saved = _saved(joint, after_cotangents)
    kept_inputs = tuple(i for i, v in enumerate(joint.inputs) if v in saved)
    kept_outputs = tuple(i for i, v in enumerate(joint.outputs) if v in saved)
    new = [v for v in saved if v not in joint.inputs and v not in joint.outputs]
    gradient = jaxprs.backward_slice(
        joint.jaxpr,
        invars=[
            *joint.at_hand,
            *(joint.inputs[i] for i in kept_inputs),
            *(joint.outputs[i] for i in kept_outputs),
            *new,
            *joint.cotangents,
        ],
        outvars=[*joint.d_inputs, *itertools.compress(joint.d_params, has_gradient)],
    )
    return StageGradient(
        stage=stage,
        forward=jaxprs.backward_slice(
            joint.jaxpr,
            invars=[*joint.at_hand, *joint.inputs],
            outvars=[*joint.outputs, *joint.results, *new],
        ),
        backward=_accumulate(
            gradient,
            num_d_inputs=len(d_inputs),
            param_avals=[v.aval for v in joint.d_params],
            has_gradient=has_gradient,
        ),
        constants=joint.constants,
        kept_inputs=kept_inputs,
        kept_outputs=kept_outputs,
        d_outputs=d_outputs,
        d_inputs=d_inputs,
    )


def _trace_joint(stage: Stage, stages: Stages, d_outputs: Sequence[Cotangent]) -> _Joint:
    counts = [len(stage.constants), len(stage.params), len(stage.batch), len(stage.inputs)]
    groups = _split(jaxprs.avals(stage.forward.invars), counts)
    moved = [stages.crossings[c].has_gradient for c in stage.inputs]
    smooth = [stages.crossings[c].has_gradient for c in stage.outputs]
    loss_aval = [stages.program.jaxpr.outvars[0].aval] * stage.makes_loss
    cotangents = [*(stages.crossings[d.crossing].aval for d in d_outputs), *loss_aval]

    def joint(constants: Any, params: Any, batch: Any, inputs: Any, cotangents: Any) -> Any:
        def forward(params: Any, moved_inputs: Any) -> Any:
            moving = iter(moved_inputs)
            merged = [next(moving) if m else x for x, m in zip(inputs, moved, strict=True)]
            outs = jaxprs.evaluate(stage.forward, [*constants, *params, *batch, *merged])
            differentiated = [y for y, s in zip(outs, smooth, strict=False) if s]
            if stage.makes_loss:  # the loss is the first of the results
                differentiated.append(outs[len(stage.outputs)])
            return differentiated, outs

        moved_inputs = [x for x, m in zip(inputs, moved, strict=True) if m]
        _, gradient, outs = jax.vjp(forward, params, moved_inputs, has_aux=True)
        d_params, d_inputs = gradient(_sum_consumers(d_outputs, cotangents))
        return outs, d_inputs, d_params

    jaxpr, new, (outs, d_inputs, _) = jaxprs.trace(
        joint, *groups, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cotangents]
    )
    jaxpr, inlined = jaxprs.inline(jaxpr, also_rules=True)  # they have been applied by now
    jaxpr = jaxprs.drop_dead_equations(jaxpr)
    constants = (*inlined, *new, *stage.constants)
    counts = [len(constants), *counts[1:], len(cotangents)]
    constant_vars, params, batch, inputs, cotangent_vars = _split(jaxpr.invars, counts)
    outputs, results, d_in, d_params = _split(
        jaxpr.outvars,
        [len(stage.outputs), len(outs) - len(stage.outputs), len(d_inputs), len(params)],
    )
    return _Joint(
        jaxpr=jaxpr,
        constants=constants,
        at_hand=[*constant_vars, *params, *batch],
        inputs=inputs,
        cotangents=cotangent_vars,
        outputs=outputs,
        results=results,
        d_inputs=d_in,
        d_params=d_params,
    )


def _sum_consumers(d_outputs: Sequence[Cotangent], cotangents: Sequence[Any]) -> list[Any]:
    """Add up the cotangents of each crossing; that of the loss, if any, stays last."""
    sums: dict[int, Any] = {}
    for d, value in zip(d_outputs, cotangents, strict=False):
        sums[d.crossing] = sums[d.crossing] + value if d.crossing in sums else value
    return [*sums.values(), *cotangents[len(d_outputs) :]]


def _saved(joint: _Joint, after_cotangents: set[Var]) -> list[Var]:
    known = [e for e in joint.jaxpr.eqns if after_cotangents.isdisjoint(e.outvars)]
    wanted = {v for v in joint.d_inputs if isinstance(v, Var)} - after_cotangents
    for eqn in joint.jaxpr.eqns:
        if not after_cotangents.isdisjoint(eqn.outvars):
            wanted.update(v for v in jaxprs.reads(eqn) if v not in after_cotangents)
    return choose_saved(known, at_hand=joint.at_hand, given=joint.inputs, wanted=wanted)


def _accumulate(
    gradient: Jaxpr,
    *,
    num_d_inputs: int,
    param_avals: Sequence[Any],
    has_gradient: Sequence[bool],
) -> Jaxpr:
    """Add the gradients of the parameters to arrays that the program is given."""
    sums = [jax.ShapeDtypeStruct(a.shape, accumulator_dtype(a.dtype)) for a in param_avals]

    def backward(args: Any, accumulated: Any) -> Any:
        outs = jaxprs.evaluate(gradient, args)
        d_params = iter(outs[num_d_inputs:])
        added = [
            total + next(d_params).astype(total.dtype) if has else total
            for total, has in zip(accumulated, has_gradient, strict=True)
        ]
        return outs[:num_d_inputs], added

    return jaxprs.trace(backward, jaxprs.avals(gradient.invars), sums)[0]


def _split(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Split `values` into consecutive groups of the given lengths."""
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]
