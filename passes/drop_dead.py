"""Remove what neither the loss nor the auxiliary output needs."""

import dataclasses

from passes import jaxprs
from passes.program import Program


def drop_dead(program: Program) -> Program:
    """Return the program without dead equations and unread constants.

    Parameters and batch leaves stay also when nobody reads them: the caller passes them.
    """
    jaxpr = jaxprs.drop_dead_equations(program.jaxpr)
    read = jaxprs.read_vars(jaxpr)
    kept = [v in read for v in program.constant_vars]
    constants = tuple(c for c, k in zip(program.constants, kept, strict=True) if k)
    dropped = {v for v, k in zip(program.constant_vars, kept, strict=True) if not k}
    invars = [v for v in jaxpr.invars if v not in dropped]
    return dataclasses.replace(
        program, jaxpr=jaxprs.rebuild(jaxpr, invars=invars), constants=constants
    )
