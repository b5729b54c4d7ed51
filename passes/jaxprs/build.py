"""Trace, run, rebuild and slice jaxprs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from passes.jaxprs.look import avals, reads


def trace(fun: Callable, *args: Any) -> tuple[Jaxpr, list[Any], Any]:
    """Trace `fun` at abstract arguments.

    Returns:
      The jaxpr, whose leading invars stand for the constants that `fun` closes over; the values of
      those constants; and the pytree of `jax.ShapeDtypeStruct` that `fun` returns.
    """
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    invars = [*jaxpr.constvars, *jaxpr.invars]
    return rebuild(jaxpr, invars=invars), list(closed.consts), out


def rebuild(
    jaxpr: Jaxpr,
    *,
    invars: Sequence[Var] | None = None,
    outvars: Sequence[Var | Literal] | None = None,
    eqns: Sequence[JaxprEqn] | None = None,
) -> Jaxpr:
    """Return `jaxpr`, without constants, with the given parts replaced."""
    return Jaxpr(
        (),
        list(jaxpr.invars if invars is None else invars),
        list(jaxpr.outvars if outvars is None else outvars),
        list(jaxpr.eqns if eqns is None else eqns),
        jaxpr.effects,
        jaxpr.debug_info.with_unknown_names(),
    )


def evaluate(jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Run `jaxpr` on `args`, or trace it if they are tracers."""
    return jax.core.eval_jaxpr(jaxpr, (), *args)


def apply(jaxpr: Jaxpr, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Run an equation of `jaxpr` on values; their shapes may be others than those of its inputs."""
    inputs = [core.gensym()(v.aval) for v in eqn.invars]
    alone = [eqn.replace(invars=[*inputs])]
    return evaluate(rebuild(jaxpr, invars=inputs, outvars=eqn.outvars, eqns=alone), values)


def check(jaxpr: Jaxpr) -> None:
    """Raise if `jaxpr` reads an unbound variable or breaks a type."""
    core.check_jaxpr(jaxpr)


def backward_slice(
    jaxpr: Jaxpr, *, invars: Sequence[Var], outvars: Sequence[Var | Literal]
) -> Jaxpr:
    """Return the part of `jaxpr` that computes `outvars` from `invars`, in the same order.

    `invars` may be any variables of `jaxpr`; those that are not read stay as unused inputs.

    Raises:
      ValueError: `outvars` need an input of `jaxpr` that is not among `invars`.
    """
    given = set(invars)
    needed = {v for v in outvars if isinstance(v, Var)} - given
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.difference_update(eqn.outvars)
            needed.update(v for v in reads(eqn) if v not in given)
    if needed:
        raise ValueError(f"the slice reads {len(needed)} values that are not among its inputs")
    return rebuild(jaxpr, invars=invars, outvars=outvars, eqns=kept[::-1])


def splice(jaxpr: Jaxpr, bodies: Mapping[int, Jaxpr]) -> Jaxpr:
    """Replace equations, by index, by the equations of bodies that do the same.

    The last inputs of a body are those of its equation. Any before them are constants, and become
    inputs in front of those of `jaxpr`.
    """
    env: dict[Var, Var | Literal] = {}
    eqns: list[JaxprEqn] = []
    extra: list[Var] = []

    def read(atom: Var | Literal) -> Var | Literal:
        return env.get(atom, atom) if isinstance(atom, Var) else atom

    for index, eqn in enumerate(jaxpr.eqns):
        args = [read(v) for v in eqn.invars]
        body = bodies.get(index)
        if body is None:
            eqns.append(eqn.replace(invars=args))
            continue
        first = len(body.invars) - len(args)
        extra += body.invars[:first]
        env.update(zip(body.invars[first:], args, strict=True))
        for inner in body.eqns:
            stack = eqn.source_info.name_stack + inner.source_info.name_stack
            info = inner.source_info.replace(name_stack=stack)
            eqns.append(inner.replace(invars=[read(v) for v in inner.invars], source_info=info))
        env.update(zip(eqn.outvars, [read(v) for v in body.outvars], strict=True))
    outvars = [read(v) for v in jaxpr.outvars]
    return rebuild(jaxpr, invars=[*extra, *jaxpr.invars], outvars=outvars, eqns=eqns)


def variable_like(var: Var, shape: Sequence[int]) -> Var:
    """Return a new variable of the type of `var`, but for its shape."""
    aval: Any = var.aval
    return core.gensym()(aval.update(shape=tuple(shape)))


def resized(
    eqn: JaxprEqn,
    *,
    invars: Sequence[Var | Literal],
    shape: Sequence[int],
    params: Mapping[str, Any],
) -> JaxprEqn:
    """Return `eqn` on other inputs, with new results of another shape; `params` change."""
    outvars = [variable_like(v, shape) for v in eqn.outvars]
    return eqn.replace(invars=list(invars), outvars=outvars, params={**eqn.params, **params})


def applied(
    fun: Callable[[list[Any]], Any], atoms: Sequence[Var | Literal]
) -> tuple[list[JaxprEqn], Var | Literal]:
    """Return the equations of `fun`, which takes a list, on `atoms`, and what holds its result."""
    jaxpr, constants, _ = trace(fun, avals(atoms))
    assert not constants, "an open jaxpr has no constants"
    env = dict(zip(jaxpr.invars, atoms, strict=True))
    eqns = [
        eqn.replace(invars=[env.get(v, v) if isinstance(v, Var) else v for v in eqn.invars])
        for eqn in jaxpr.eqns
    ]
    return eqns, jaxpr.outvars[0]
