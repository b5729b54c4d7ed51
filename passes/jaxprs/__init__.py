"""Jaxprs: all that knows JAX's own types, its private parts, and how these differ between versions.

Everywhere else a jaxpr is an open `Jaxpr` without constants: its inputs are `invars`, its equations
`eqns`, its results `outvars`. Here such jaxprs are traced, rebuilt, sliced and evaluated.
"""

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from passes.jaxprs.build import (
    applied,
    apply,
    backward_slice,
    check,
    evaluate,
    rebuild,
    resized,
    splice,
    trace,
    variable_like,
)
from passes.jaxprs.calls import has_shardings, hides_functions, inline, with_own_outputs
from passes.jaxprs.libraries import library_work
from passes.jaxprs.look import (
    avals,
    count_primitives,
    dependents,
    equations,
    indexed_sizes,
    is_float,
    nbytes,
    read_vars,
    reads,
    shape_of,
    sub_jaxprs,
)
from passes.jaxprs.loops import Scan, While, scan_of, while_of
from passes.jaxprs.private import drop_dead_equations, least_memory, located, process_service

__all__ = [
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Scan",
    "Var",
    "While",
    "applied",
    "apply",
    "avals",
    "backward_slice",
    "check",
    "count_primitives",
    "dependents",
    "drop_dead_equations",
    "equations",
    "evaluate",
    "has_shardings",
    "hides_functions",
    "indexed_sizes",
    "inline",
    "is_float",
    "least_memory",
    "library_work",
    "located",
    "nbytes",
    "process_service",
    "read_vars",
    "reads",
    "rebuild",
    "resized",
    "scan_of",
    "shape_of",
    "splice",
    "sub_jaxprs",
    "trace",
    "variable_like",
    "while_of",
    "with_own_outputs",
]
