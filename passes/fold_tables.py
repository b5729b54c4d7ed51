"""Compute tables once, when compiling: what reads nothing and costs more than arithmetic.

Rotary cosines, sinusoidal positions and the like are the same for every microbatch. In one program
with a loop over microbatches XLA takes them out of the loop; a stage's program, which runs once a
microbatch, would compute them each time, and XLA may do so for every element that reads them.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from passes import jaxprs
from passes.jaxprs import Var
from passes.saved_values import CHEAP
from passes.stages import Stage, Stages

# What makes a table worth keeping; all take and give floats.
_COSTLY = frozenset(
    """
    sin cos tan asin acos atan atan2 sinh cosh tanh exp exp2 expm1 log log1p pow sqrt rsqrt cbrt
    logistic erf erfc
    """.split()  # noqa: SIM905
)
_MAX_BYTES = 2**24  # of a table; larger ones are better computed than kept


def fold_tables(stages: Stages) -> Stages:
    """Return the stages with every table as a constant, equal ones as one.

    Cheap equations behind the last costly one stay: they are computed where they are read, and
    take no memory.
    """
    computed: dict[str, list[np.ndarray]] = {}
    folded = tuple(_fold(stage, computed) for stage in stages.stages)
    return dataclasses.replace(stages, stages=folded)


def _fold(stage: Stage, computed: dict[str, list[np.ndarray]]) -> Stage:
    tables = _tables(stage)
    if not tables:
        return stage
    body = jaxprs.backward_slice(stage.forward, invars=(), outvars=tables)
    text = str(body)
    if text not in computed or "[...]" in text:  # which stands for the values of some array
        computed[text] = jax.device_get(jax.jit(lambda: jaxprs.evaluate(body, ()))())
    constants: dict[Any, tuple[Var, np.ndarray]] = {}
    equal: dict[Var, Var] = {}
    for v, value in zip(tables, computed[text], strict=True):
        key = value.shape, value.dtype, value.tobytes()
        equal[v], _ = constants.setdefault(key, (v, value))
    eqns = [
        eqn.replace(invars=[equal.get(v, v) if isinstance(v, Var) else v for v in eqn.invars])
        for eqn in stage.forward.eqns
        if equal.keys().isdisjoint(eqn.outvars)
    ]
    invars = [*(v for v, _ in constants.values()), *stage.forward.invars]
    return dataclasses.replace(
        stage,
        forward=jaxprs.drop_dead_equations(jaxprs.rebuild(stage.forward, invars=invars, eqns=eqns)),
        constants=(*(value for _, value in constants.values()), *stage.constants),
    )


def _tables(stage: Stage) -> list[Var]:
    """Return the results of costly equations on known values that any other equation reads."""
    folds: dict[Var, bool] = {}  # the known values, and whether one is to be a table
    for eqn in stage.forward.eqns:
        costly = eqn.primitive.name in _COSTLY
        if (costly or eqn.primitive.name in CHEAP) and folds.keys() >= set(jaxprs.reads(eqn)):
            small = jaxprs.nbytes(v.aval for v in eqn.outvars) <= _MAX_BYTES
            own = set(stage.forward.outvars).isdisjoint(eqn.outvars)  # a result is no input
            folds.update(dict.fromkeys(eqn.outvars, costly and small and own))
    read = {v for v in stage.forward.outvars if isinstance(v, Var)}
    tables: list[Var] = []
    for eqn in reversed(stage.forward.eqns):
        if read.isdisjoint(eqn.outvars):
            continue
        if folds.get(eqn.outvars[0], False):
            tables += eqn.outvars
        else:
            read.update(jaxprs.reads(eqn))
    return tables[::-1]
