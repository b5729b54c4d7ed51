"""Keep what an optimizer computes from a split parameter in the same parts.

The update of an optimizer is traced on whole leaves. Here each of them is replaced by its parts,
and so is what is computed from it element by element; a reduction reduces the parts and combines
the results. So every part is updated where it lives. An equation that is not known to work on
parts is given the whole, put together from them: slower, but the same.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from passes import jaxprs
from passes.boxes import Box, Pieces, meet, reshaped, whole
from passes.in_parts import REDUCTIONS, compute_demands, find_demands
from passes.jaxprs import Jaxpr, JaxprEqn, Var, shape_of
from passes.narrow import ELEMENTWISE
from passes.peel_scans import unrolled
from passes.place import Tied


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitValues:
    """A jaxpr that was split.

    Attributes:
      jaxpr: takes every piece of every input, and returns every piece of every result.
      inputs: the pieces of each input; a single one if it is whole.
    """

    jaxpr: Jaxpr
    inputs: tuple[Pieces, ...]


def split_values(
    jaxpr: Jaxpr, *, inputs: Sequence[Pieces | None], outputs: Sequence[Pieces | Tied]
) -> SplitValues:
    """Replace inputs and results by their parts, and compute as much as possible in parts.

    Args:
      jaxpr: without calls.
      inputs: the pieces that each input is given in; None for one that is given in those of the
        first value that it is combined with element by element, or whole if there is none.
      outputs: the pieces that are wanted of each result; `Tied` for those of an input.
    """
    given = {v: p for v, p in zip(jaxpr.invars, inputs, strict=True) if p and len(p) > 1}
    undecided = {v for v, p in zip(jaxpr.invars, inputs, strict=True) if p is None}
    pieces = _pieces(jaxpr, given, undecided)
    held = tuple(pieces.get(v, (whole(shape_of(v)),)) for v in jaxpr.invars)
    demands = find_demands(
        jaxpr,
        outputs=[held[want.input] if isinstance(want, Tied) else want for want in outputs],
        pieces=pieces,
        through=lambda eqn: True,
    )
    return SplitValues(jaxpr=compute_demands(demands), inputs=held)


def unroll_split_scans(jaxpr: Jaxpr, outputs: Sequence[Pieces]) -> tuple[Jaxpr, list[Any]]:
    """Unroll the loops of which parts are wanted, if no iteration needs one before.

    Flax draws the stacked parameters of a scan in a scan: a part is then drawn by itself.

    Returns:
      The jaxpr, with an input in front for each constant of a loop, and these constants.
    """
    constants: list[Any] = []
    while True:
        demands = find_demands(jaxpr, outputs=outputs, pieces={}, through=lambda eqn: True)
        bodies: dict[int, Jaxpr] = {}
        new: list[Any] = []
        for index, eqn in enumerate(jaxpr.eqns):
            scan = jaxprs.scan_of(eqn)
            wanted = [(v, box) for v in eqn.outvars for box in demands.boxes.get(v, ())]
            if scan and not scan.num_carry and any(box != whole(shape_of(v)) for v, box in wanted):
                bodies[index], own, _ = jaxprs.trace(unrolled(scan), *jaxprs.avals(eqn.invars))
                new += own
        if not bodies:
            return jaxpr, constants
        jaxpr, inlined = jaxprs.inline(jaxprs.splice(jaxpr, bodies))
        constants = [*inlined, *new, *constants]


def _pieces(
    jaxpr: Jaxpr, given: Mapping[Var, Pieces], undecided: Iterable[Var]
) -> dict[Var, Pieces]:
    """Return the values that are computed in pieces, and these; the inputs among them."""
    given = dict(given)
    while True:
        pieces = dict(given)
        roots = {v: frozenset([v]) for v in undecided if v not in given}
        decided: dict[Var, Pieces] = {}
        for eqn in jaxpr.eqns:
            found = _pieces_of_result(eqn, pieces)
            if found is not None:
                pieces.update((v, found) for v in eqn.outvars)
            if eqn.primitive.name in ELEMENTWISE:
                shape = shape_of(eqn.outvars[0])
                met = [v for v in jaxprs.reads(eqn) if v in roots and shape_of(v) == shape]
                below = frozenset().union(*(roots[v] for v in met))
                if found is None:
                    roots.update((v, below) for v in eqn.outvars)
                else:
                    decided = {**dict.fromkeys(below, found), **decided}
        if not decided:
            return pieces
        given |= decided


def _pieces_of_result(eqn: JaxprEqn, pieces: Mapping[Var, Pieces]) -> Pieces | None:
    """Return the pieces in which the results of `eqn` are computed; None for the whole."""
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])
    if name in ELEMENTWISE:
        met = {pieces[v] for v in jaxprs.reads(eqn) if v in pieces and shape_of(v) == shape}
        return met.pop() if len(met) == 1 else None
    operand = eqn.invars[0] if eqn.invars else None
    if not isinstance(operand, Var) or operand not in pieces:
        return None
    boxes, params = pieces[operand], eqn.params
    if name == "transpose":
        return tuple(tuple(box[axis] for axis in params["permutation"]) for box in boxes)
    if name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
        moved = [reshaped(box, shape_of(operand), shape) for box in boxes]
        return None if None in moved else tuple(box for box in moved if box is not None)
    if name == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
        return tuple(
            tuple(
                box[axes.index(a)] if a in axes and shape_of(operand)[axes.index(a)] > 1 else (0, n)
                for a, n in enumerate(shape)
            )
            for box in boxes
        )
    if name in REDUCTIONS:
        gone = params["axes"]
        return _distinct(tuple(s for a, s in enumerate(box) if a not in gone) for box in boxes)
    return None


def _distinct(boxes: Iterable[Box]) -> Pieces | None:
    """Return the different ones of `boxes`; None if there is one only, or some overlap."""
    different = tuple(dict.fromkeys(boxes))
    if any(meet(a, b) is not None for a, b in itertools.combinations(different, 2)):
        return None
    return different if len(different) > 1 else None
