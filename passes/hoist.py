"""Take out of remat what would only be sent because a remat returns it.

A block under remat that returns its position bias or its mask to the next blocks hides that these
are no activations. Outside, they are computed where they are read. Inside, a copy stays for the
block itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend.core.primitives import closed_call_p, remat_p

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Var
from passes.origins import Origin, add_origins, called_body, origins_inside, origins_of_inputs
from passes.program import Program


def hoist(program: Program) -> Program:
    """Return the program with every remat returning activations only."""
    origins = origins_of_inputs(program)
    eqns = []
    for eqn in program.jaxpr.eqns:
        add_origins([eqn], origins)
        body = called_body(eqn) if eqn.primitive is remat_p else None
        eqns += [eqn] if body is None else _parts(eqn, body, origins)
    if eqns == program.jaxpr.eqns:
        return program
    jaxpr, constants = jaxprs.inline(jaxprs.rebuild(program.jaxpr, eqns=eqns))
    return dataclasses.replace(program, jaxpr=jaxpr, constants=(*constants, *program.constants))


def _parts(eqn: JaxprEqn, body: Jaxpr, origins: dict[Var, Origin]) -> list[JaxprEqn]:
    """Return a call that makes what is no activation, and the remat that makes the rest."""
    inside = origins_inside(eqn, body, origins)
    of_results = [Origin.NOTHING if isinstance(v, Literal) else inside[v] for v in body.outvars]
    stays = [Origin.ACTIVATION in origin for origin in of_results]
    if all(stays):
        return [eqn]
    origins.update(zip(eqn.outvars, of_results, strict=True))  # finer than that of the whole
    taken, kept = (_pick(body.outvars, stays, which) for which in (False, True))
    outside = jaxprs.backward_slice(body, invars=body.invars, outvars=taken)
    inside_still = jaxprs.drop_dead_equations(jaxprs.rebuild(body, outvars=kept))
    return [
        eqn.replace(
            primitive=closed_call_p,
            params={"call_jaxpr": outside},
            outvars=_pick(eqn.outvars, stays, False),
        ),
        eqn.replace(
            params={**eqn.params, "jaxpr": inside_still}, outvars=_pick(eqn.outvars, stays, True)
        ),
    ]


def _pick(values: Sequence[Any], stays: Sequence[bool], which: bool) -> list[Any]:
    return [v for v, s in zip(values, stays, strict=True) if s == which]
