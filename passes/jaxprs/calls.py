"""Equations that only call their body, and jaxprs without them."""

from typing import Any

import jax
from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import remat_p

from passes.jaxprs.build import evaluate, rebuild, trace
from passes.jaxprs.look import avals
from passes.jaxprs.private import optimization_barrier_p

# Primitives that only call their body, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}

# Likewise, once nothing is to be differentiated any more.
_RULES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", remat_p.name: "jaxpr"}


def _call_body(eqn: JaxprEqn, *, also_rules: bool) -> tuple[Jaxpr, list[Any]] | None:
    """Return the body and the constants of an equation that only calls it, else None."""
    name = eqn.primitive.name
    key = _CALLS.get(name) or (_RULES.get(name) if also_rules else None)
    if key is None:
        return None
    body = eqn.params[key]
    inner = getattr(body, "jaxpr", body)
    return inner, list(getattr(body, "consts", ()))


def inline(jaxpr: Jaxpr, *, also_rules: bool = False) -> tuple[Jaxpr, list[Any]]:
    """Replace calls by their bodies, at every depth outside of loops, branches and custom rules.

    With `also_rules`, functions with custom derivative rules count as calls: the rules are lost.
    So does the recomputation of a `jax.checkpoint`; as in JAX, a barrier stands before it, which
    keeps it from being merged with what was computed before.

    Returns:
      The jaxpr, with one more invar in front for each constant that a body closed over, and the
      values of these constants.
    """
    fresh = core.gensym()
    env: dict[Var, Var | Literal] = {}
    const_vars: dict[int, Var] = {}  # by the id of the value, which may be closed over many times
    const_values: list[Any] = []
    eqns: list[JaxprEqn] = []

    def read(atom: Var | Literal) -> Var | Literal:
        return env.get(atom, atom) if isinstance(atom, Var) else atom

    def walk(body: Jaxpr, name_stack: Any, rename: bool) -> None:
        for eqn in body.eqns:
            info = eqn.source_info
            if name_stack is not None:
                info = info.replace(name_stack=name_stack + info.name_stack)
            call = _call_body(eqn, also_rules=also_rules)
            if call is None:
                outvars = [fresh(v.aval) for v in eqn.outvars] if rename else eqn.outvars
                env.update(zip(eqn.outvars, outvars, strict=True))
                invars = [read(v) for v in eqn.invars]
                eqns.append(eqn.replace(invars=invars, outvars=outvars, source_info=info))
                continue
            inner, consts = call
            args = [read(v) for v in eqn.invars]
            if eqn.params.get("differentiated") and eqn.params["prevent_cse"]:
                behind = {v: fresh(v.aval) for v in args if isinstance(v, Var)}
                eqns.append(
                    eqn.replace(
                        primitive=optimization_barrier_p,
                        params={},
                        invars=list(behind),
                        outvars=list(behind.values()),
                        source_info=info,
                    )
                )
                args = [behind.get(v, v) if isinstance(v, Var) else v for v in args]
            for var, value in zip(inner.constvars, consts, strict=True):
                if id(value) not in const_vars:
                    const_vars[id(value)] = fresh(var.aval)
                    const_values.append(value)
                env[var] = const_vars[id(value)]
            # The same body may be called many times: its variables are bound anew each time.
            env.update(zip(inner.invars, args, strict=True))
            walk(inner, info.name_stack, True)
            env.update(zip(eqn.outvars, [read(v) for v in inner.outvars], strict=True))

    walk(jaxpr, None, False)
    outvars = [read(v) for v in jaxpr.outvars]
    return rebuild(
        jaxpr, invars=[*const_vars.values(), *jaxpr.invars], outvars=outvars, eqns=eqns
    ), (const_values)


def with_own_outputs(jaxpr: Jaxpr, *, also_inputs: bool) -> Jaxpr:
    """Return `jaxpr` with no value twice among its results, but copies.

    With `also_inputs`, inputs among the results are copied, too.
    """
    taken = set(jaxpr.invars) if also_inputs else set()
    shared = []
    for v in jaxpr.outvars:
        shared.append(v in taken if isinstance(v, Var) else False)
        taken.update([v] if isinstance(v, Var) else [])

    def fun(*args: Any) -> list[Any]:
        outs = evaluate(jaxpr, args)
        return [jax.numpy.copy(x) if again else x for x, again in zip(outs, shared, strict=True)]

    return inline(trace(fun, *avals(jaxpr.invars))[0])[0] if any(shared) else jaxpr


def has_shardings(eqn: JaxprEqn) -> bool:
    """Whether `eqn` is a jit that was given shardings of its arguments or results."""
    keys = ("in_shardings", "out_shardings")
    given = [each for key in keys for each in eqn.params.get(key, ())]
    return eqn.primitive.name in _CALLS and any(isinstance(s, jax.sharding.Sharding) for s in given)


def hides_functions(eqn: JaxprEqn) -> bool:
    """Whether the text of `eqn` leaves out what it does: a derivative rule, what a remat saves."""
    return eqn.primitive.name in _RULES
