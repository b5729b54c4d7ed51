"""Replace calls by their bodies, so that a jitted model shows its layers.

Loops, branches, `jax.checkpoint` and custom derivative rules stay: they mean something.
"""

import dataclasses

from passes import jaxprs
from passes.program import Program


def inline_calls(program: Program) -> Program:
    """Return the program without jit and closed calls."""
    jaxpr, constants = jaxprs.inline(program.jaxpr)
    return dataclasses.replace(program, jaxpr=jaxpr, constants=(*constants, *program.constants))
