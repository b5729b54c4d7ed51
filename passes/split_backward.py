"""Split the backward of a stage into the gradient of its inputs and that of its weights.

The equations that the cotangents of the inputs need are the input gradient, the rest is the weight
gradient (as in Qi et al. 2024, arXiv 2401.10241). What the weight gradient reads out of the input
gradient is kept, unless it follows by cheap equations from the values that the forward saved.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Var
from passes.saved_values import CHEAP, FORM, choose_saved
from passes.stages import Operand, Role, StageProgram, slice_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitBackward:
    """A backward in two programs, each None if it has nothing to do.

    Attributes:
      input_grad: writes the cotangents of the inputs, and what it keeps.
      weight_grad: writes the sums of gradients. It reads what was kept, and what the backward as a
        whole was given.
    """

    input_grad: StageProgram | None
    weight_grad: StageProgram | None


def split_backward(backward: StageProgram) -> SplitBackward:
    """Split a backward; nothing heavy is computed twice."""
    written = list(zip(backward.writes, backward.jaxpr.outvars, strict=True))
    d_inputs = [(operand, v) for operand, v in written if operand.role == Role.COTANGENT]
    sums = [(operand, v) for operand, v in written if operand.role == Role.SUM]
    if not (d_inputs and sums):
        return SplitBackward(
            input_grad=backward if d_inputs else None, weight_grad=backward if sums else None
        )
    jaxpr = backward.jaxpr
    given = dict(zip(jaxpr.invars, backward.reads, strict=True))
    first, rest = _cut(jaxpr, written)
    handed_on = _handed_on(given, first, wanted=jaxprs.read_vars(rest))
    # A cotangent that is written anyway is read from its own buffer.
    sent = {v: operand for operand, v in d_inputs if v in handed_on}
    kept = {v: Operand(Role.KEPT, k) for k, v in enumerate(v for v in handed_on if v not in sent)}
    totals = {v: operand for v, operand in given.items() if operand.role == Role.SUM}
    return SplitBackward(
        input_grad=slice_program(jaxpr, given, [*d_inputs, *((x, v) for v, x in kept.items())]),
        # The sums stand last: see `donations`.
        weight_grad=slice_program(
            jaxpr, {v: x for v, x in given.items() if v not in totals} | sent | kept | totals, sums
        ),
    )


def held_for_weights(backward: StageProgram) -> list[Var]:
    """Return what a whole backward holds for weight gradients that are left to its end.

    XLA leaves them there. Their cheap equations are fused with what reads them, and so are run
    there too; what was saved is there anyway.
    """
    jaxpr = backward.jaxpr
    given = dict(zip(jaxpr.invars, backward.reads, strict=True))
    written = list(zip(backward.writes, jaxpr.outvars, strict=True))
    first, rest = _cut(jaxpr, written)
    arriving = [v for v, x in given.items() if x.role == Role.COTANGENT]
    made = {v for eqn in first.eqns for v in eqn.outvars}
    return choose_saved(
        first.eqns,
        at_hand=[v for v in given if v not in arriving],
        given=arriving,
        wanted=jaxprs.read_vars(rest).intersection(made.union(arriving)),
    )


def held_for_kept_bytes(split: SplitBackward) -> int:
    """Return what an input gradient holds for what it keeps, beyond the memory of that itself.

    Cheap equations are fused with what reads them: a sum of gradients that only W and other cheap
    equations read is made for W alone, and XLA is free to leave it to the end. Until then all that
    it is the sum of stays, but for what its own memory has room for.
    """
    if split.input_grad is None or split.weight_grad is None:
        return 0
    jaxpr, held = split.input_grad.jaxpr, 0
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    stored = _stored(jaxpr)
    results = {v: x for x, v in zip(split.input_grad.writes, jaxpr.outvars, strict=True)}
    there = stored.intersection(results)
    for v in makers:
        if v not in stored and v in results and results[v].role == Role.KEPT:
            made_of = _made_of(v, makers, stored) - there
            there |= made_of
            held += max(0, jaxprs.nbytes(x.aval for x in made_of) - jaxprs.nbytes([v.aval]))
    return held


def _stored(jaxpr: Jaxpr) -> set[Var]:
    """Return what equations make that is not fused with all of its readers: in memory at once."""
    stored: set[Var] = set()
    for eqn in reversed(jaxpr.eqns):
        name = eqn.primitive.name
        if name not in CHEAP:
            stored.update(eqn.outvars)
        if name not in CHEAP or (name in FORM and not stored.isdisjoint(eqn.outvars)):
            stored.update(jaxprs.reads(eqn))
    return stored


def _made_of(value: Var, makers: Mapping[Var, JaxprEqn], stored: set[Var]) -> set[Var]:
    """Return what is in memory of which a value follows by cheap equations, but for inputs."""
    found: set[Var] = set()
    behind = [value]
    while behind:
        v = behind.pop()
        if v in stored and v in makers:
            found.add(v)
        elif v in makers:
            behind += jaxprs.reads(makers[v])
    return found


def _cut(jaxpr: Jaxpr, written: Sequence[tuple[Operand, Var | Literal]]) -> tuple[Jaxpr, Jaxpr]:
    """Return the equations that the gradient of the inputs needs, and the others of the sums."""
    d_inputs = [v for operand, v in written if operand.role == Role.COTANGENT]
    sums = [v for operand, v in written if operand.role == Role.SUM]
    first = jaxprs.backward_slice(jaxpr, invars=jaxpr.invars, outvars=d_inputs)
    made = [v for eqn in first.eqns for v in eqn.outvars]
    return first, jaxprs.backward_slice(jaxpr, invars=[*jaxpr.invars, *made], outvars=sums)


def _handed_on(given: Mapping[Var, Operand], first: Jaxpr, *, wanted: set[Var]) -> list[Var]:
    """Return what the equations `first` make of which `wanted` is then computed cheaply.

    What depends on a cotangent is handed on as it is. The rest comes from the forward: `wanted`
    may follow from its saved values by cheap equations, as in the backward as a whole.
    """
    made = [v for eqn in first.eqns for v in eqn.outvars]
    arriving = [v for v, x in given.items() if x.role in (Role.COTANGENT, Role.D_LOSS)]
    moving = jaxprs.dependents(first, arriving)
    held = [v for v, x in given.items() if x.role in (Role.CROSSING, Role.SAVED)]
    again = choose_saved(
        [eqn for eqn in first.eqns if moving.isdisjoint(eqn.outvars)],
        at_hand=[v for v in given if v not in held],
        given=held,
        wanted=wanted.intersection([*held, *made]) - moving,
    )
    known = [v for v in again if v not in given]
    return [*known, *(v for v in made if v in wanted and v in moving)]
