"""Add scalars where the last of them is made.

Layers that each have a share in the loss, as experts have with their balance, then hand on the sum
so far. If it were taken in the end, every share would go to the last stage by itself, past all
stages in between.
"""

import dataclasses

from passes import jaxprs
from passes.jaxprs import JaxprEqn, Var
from passes.program import Program


def add_early(program: Program) -> Program:
    """Return the program with every sum of scalars directly behind what it adds."""
    made_at: dict[Var, int] = {}
    places = []
    for index, eqn in enumerate(program.jaxpr.eqns):
        before = [made_at[v] for v in jaxprs.reads(eqn) if v in made_at]
        place = max(before) if before and _adds_scalars(eqn) else index
        made_at.update((v, place) for v in eqn.outvars)
        places.append((place, index))
    eqns = [program.jaxpr.eqns[index] for _, index in sorted(places)]
    return dataclasses.replace(program, jaxpr=jaxprs.rebuild(program.jaxpr, eqns=eqns))


def _adds_scalars(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in ("add", "add_any") and not jaxprs.shape_of(eqn.outvars[0])
