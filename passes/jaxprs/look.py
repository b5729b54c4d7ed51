"""What a jaxpr says of its variables and equations."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var


def reads(eqn: JaxprEqn) -> Iterator[Var]:
    """Yield the variables that `eqn` reads."""
    return (v for v in eqn.invars if isinstance(v, Var))


def read_vars(jaxpr: Jaxpr) -> set[Var]:
    """Return the variables that an equation or the result of `jaxpr` reads."""
    results = {v for v in jaxpr.outvars if isinstance(v, Var)}
    return results.union(*(reads(eqn) for eqn in jaxpr.eqns))


def dependents(jaxpr: Jaxpr, seeds: Iterable[Var]) -> set[Var]:
    """Return the variables that depend on `seeds`, themselves included."""
    found = set(seeds)
    for eqn in jaxpr.eqns:
        if not found.isdisjoint(reads(eqn)):
            found.update(eqn.outvars)
    return found


def avals(variables: Iterable[Var | Literal]) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of `variables`, in the form in which functions are traced."""
    types: Iterator[Any] = (v.aval for v in variables)
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in types]


def shape_of(atom: Var | Literal) -> tuple[int, ...]:
    """Return the shape of the array that `atom` stands for."""
    aval: Any = atom.aval
    return tuple(aval.shape)


def is_float(aval: Any) -> bool:
    """Whether values of this type have a gradient."""
    return jax.dtypes.issubdtype(aval.dtype, jax.numpy.inexact)


def nbytes(avals: Iterable[Any]) -> int:
    """Return the bytes that values of these types take."""
    return sum(aval.size * aval.dtype.itemsize for aval in avals)


def sub_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Yield the jaxprs inside of `eqn`: bodies of loops, branches, calls.

    That of a kernel is none: it reads and writes memory, and is for one block.
    """
    is_kernel = eqn.primitive.name == "pallas_call"
    return iter(()) if is_kernel else iter(core.jaxprs_in_params(eqn.params))


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations of `jaxpr`, those inside of loops, branches and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from equations(inner)


def count_primitives(jaxpr: Jaxpr) -> dict[str, int]:
    """Count the equations of each primitive, those inside of loops and branches included."""
    return collections.Counter(eqn.primitive.name for eqn in equations(jaxpr))


def indexed_sizes(eqn: JaxprEqn) -> list[int]:
    """Return how long the axes are that a gather has indices for; none of other equations."""
    if eqn.primitive.name != "gather":
        return []
    shape = shape_of(eqn.invars[0])
    return [shape[axis] for axis in eqn.params["dimension_numbers"].start_index_map]
