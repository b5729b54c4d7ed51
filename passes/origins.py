"""What the values of a program are computed from, and so which of them are worth sending."""

import enum
import functools
import operator
from collections.abc import Iterable

from jax.extend.core import primitives

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Var
from passes.program import Program

# Reading a parameter in one of these (a bias, the scale of a norm) is no work worth a layer.
_LIGHT = frozenset(
    """
    add add_any sub mul div max min pow neg select_n convert_element_type broadcast_in_dim
    reshape squeeze transpose concatenate
    """.split()  # noqa: SIM905
)
# They call one body with their own operands.
_CALLS = (primitives.jit_p, primitives.closed_call_p, primitives.remat_p)
_RULES = (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)


class Origin(enum.Flag):
    """What a value is computed from.

    An activation depends on parameters and on the batch, by more than light arithmetic on values
    that each depend on one of them: a position bias plus a mask is none. Only activations are ever
    sent; all else is computed again where it is read. A constant that the loss function closes over
    is neither: a weight times the mask of its pruning is still made of parameters.
    """

    NOTHING = 0
    PARAMS = enum.auto()
    BATCH = enum.auto()
    ACTIVATION = enum.auto()


BOTH = Origin.PARAMS | Origin.BATCH


def find_origins(program: Program) -> dict[Var, Origin]:
    """Return what each value of the program is computed from."""
    origins = origins_of_inputs(program)
    add_origins(program.jaxpr.eqns, origins)
    return origins


def origins_of_inputs(program: Program) -> dict[Var, Origin]:
    """Return the origins of what a program is given."""
    origins = dict.fromkeys(program.constant_vars, Origin.NOTHING)
    origins.update(dict.fromkeys(program.batch_vars, Origin.BATCH))
    origins.update(dict.fromkeys(program.param_vars, Origin.PARAMS))
    return origins


def origins_inside(eqn: JaxprEqn, body: Jaxpr, origins: dict[Var, Origin]) -> dict[Var, Origin]:
    """Return the origins of the values in the body that `eqn` calls."""
    inside = dict.fromkeys(body.constvars, Origin.NOTHING)
    for var, operand in zip(body.invars, eqn.invars, strict=True):
        inside[var] = Origin.NOTHING if isinstance(operand, Literal) else origins[operand]
    add_origins(body.eqns, inside)
    return inside


def add_origins(eqns: Iterable[JaxprEqn], origins: dict[Var, Origin]) -> None:
    """Add the origins of what the equations make to those of what they read."""
    for eqn in eqns:
        body = called_body(eqn)
        if body is None:
            origin = _union(jaxprs.reads(eqn), origins)
            if BOTH in origin and eqn.primitive.name not in _LIGHT:
                origin |= Origin.ACTIVATION
        else:
            results = (v for v in body.outvars if isinstance(v, Var))
            origin = _union(results, origins_inside(eqn, body, origins))
        origins.update(dict.fromkeys(eqn.outvars, origin))


def _union(values: Iterable[Var], origins: dict[Var, Origin]) -> Origin:
    return functools.reduce(operator.or_, (origins[v] for v in values), Origin.NOTHING)


def called_body(eqn: JaxprEqn) -> Jaxpr | None:
    """Return the body of a call, a remat or a function with custom rules; None of all else."""
    if eqn.primitive not in (*_CALLS, *_RULES):
        return None
    (body,) = jaxprs.sub_jaxprs(eqn)
    return body


def is_heavy(eqn: JaxprEqn, origins: dict[Var, Origin]) -> bool:
    """Whether `eqn` does more than light arithmetic with something that parameters make."""
    return eqn.primitive.name not in _LIGHT and any(
        Origin.PARAMS in origins[v] and Origin.ACTIVATION not in origins[v]
        for v in jaxprs.reads(eqn)
    )
