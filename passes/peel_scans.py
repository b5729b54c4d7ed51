"""Unroll the loops over layers, so that a layer's weights are slices of the stacked parameters.

`nn.scan`, `nnx.scan` and most large models run all their layers in one `lax.scan`, which a stage
would have to hold whole. Here a layer loop is a scan in which some matmul multiplies what is
carried along with a weight of this iteration alone, one that is computed from parameters, and at
most constants beside them. Other scans stay: over time, over microbatches, with weights that all
iterations share.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Scan, Var
from passes.program import Program

_MATMULS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})


def peel_scans(program: Program) -> Program:
    """Return the program with the iterations of its layer loops in a row; nested loops, too."""
    while True:
        jaxpr, constants = _peel_outermost(program)
        if jaxpr is program.jaxpr:
            return program
        jaxpr, inlined = jaxprs.inline(jaxpr)
        program = dataclasses.replace(
            program, jaxpr=jaxpr, constants=(*inlined, *constants, *program.constants)
        )


def _peel_outermost(program: Program) -> tuple[Jaxpr, list[Any]]:
    """Return the jaxpr, with an input in front for each constant of a body, and these constants."""
    of_batch = jaxprs.dependents(program.jaxpr, program.batch_vars)
    weights = jaxprs.dependents(program.jaxpr, program.param_vars) - of_batch
    bodies: dict[int, Jaxpr] = {}
    constants: list[Any] = []
    for index, eqn in enumerate(program.jaxpr.eqns):
        scan = jaxprs.scan_of(eqn)
        if scan is not None and scan.length and _is_layer_loop(eqn, scan, weights, of_batch):
            bodies[index], new, _ = jaxprs.trace(unrolled(scan), *jaxprs.avals(eqn.invars))
            constants += new
    return (jaxprs.splice(program.jaxpr, bodies) if bodies else program.jaxpr), constants


def _is_layer_loop(eqn: JaxprEqn, scan: Scan, weights: set[Var], of_batch: set[Var]) -> bool:
    first = scan.num_consts
    stop = first + scan.num_carry
    pairs = list(zip(scan.jaxpr.invars, eqn.invars, strict=True))
    carried = [v for v, _ in pairs[first:stop]]
    outside = [*pairs[:first], *pairs[stop:]]
    return _multiplies(
        scan.jaxpr,
        weights=[v for v, x in pairs[stop:] if isinstance(x, Var) and x in weights],
        carried=carried,
        others=[v for v, x in outside if isinstance(x, Var) and x in of_batch],
    )


def _multiplies(
    jaxpr: Jaxpr, *, weights: Iterable[Var], carried: Iterable[Var], others: Iterable[Var]
) -> bool:
    """Whether a matmul reads a value of `weights` alone, and one that depends on `carried`."""
    carried = jaxprs.dependents(jaxpr, carried)
    others = jaxprs.dependents(jaxpr, others) | carried
    weights = jaxprs.dependents(jaxpr, weights) - others
    for eqn in jaxpr.eqns:
        if weights.isdisjoint(jaxprs.reads(eqn)) or carried.isdisjoint(jaxprs.reads(eqn)):
            continue
        if eqn.primitive.name in _MATMULS:
            return True
        for inner in jaxprs.sub_jaxprs(eqn):
            # The index of a branch, and what only the condition of a while reads, come before.
            outer = dict(zip(reversed(inner.invars), reversed(eqn.invars), strict=False))
            if _multiplies(
                inner,
                weights=[v for v, x in outer.items() if isinstance(x, Var) and x in weights],
                carried=[v for v, x in outer.items() if isinstance(x, Var) and x in carried],
                others=[v for v, x in outer.items() if isinstance(x, Var) and x in others],
            ):
                return True
    return False


def unrolled(scan: Scan) -> Callable[..., list[Any]]:
    """Return a function that does what `scan` does, one iteration after the other."""

    def run(*args: Any) -> list[Any]:
        first = scan.num_consts
        stop = first + scan.num_carry
        carry: list[Any] = list(args[first:stop])
        ys: list[Any] = [None] * scan.length
        order = range(scan.length)
        for k in reversed(order) if scan.reverse else order:
            xs = [jax.lax.index_in_dim(x, k, keepdims=False) for x in args[stop:]]
            outs = scan.body(*args[:first], *carry, *xs)
            carry, ys[k] = outs[: scan.num_carry], outs[scan.num_carry :]
        return [*carry, *(_stack(each) for each in zip(*ys, strict=True))]

    return run


def _stack(values: Any) -> Any:
    return jax.lax.concatenate([jax.lax.expand_dims(value, (0,)) for value in values], 0)
