"""Compute parts of values instead of whole ones, wherever an equation allows it.

Going backwards through a jaxpr, `find_demands` follows the boxes that are wanted of each value to
the boxes that are read of those it is computed from: a slice turns a demand for its whole result
into one for a box. Where an equation has no rule for parts, all of it is computed, and then cut.
Going forwards, `compute_demands` writes the equations of all the parts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from passes import jaxprs
from passes.boxes import Box, Pieces, assemble, meet, sizes, whole
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Var
from passes.narrow import Narrowed, narrow

Atom = Var | Literal

# How to combine what parts were reduced to.
REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_and": jax.lax.bitwise_and,
    "reduce_max": jax.lax.max,
    "reduce_min": jax.lax.min,
    "reduce_or": jax.lax.bitwise_or,
    "reduce_prod": jax.lax.mul,
    "reduce_sum": jax.lax.add,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demands:
    """What is to be computed of a jaxpr.

    Attributes:
      jaxpr: the whole.
      outputs: the boxes that are wanted of each result.
      pieces: values, inputs among them, that only ever exist in these parts.
      boxes: what is read of each value; values that nobody reads are missing.
      ways: for each result of an equation that can be computed in parts, how, by box.
    """

    jaxpr: Jaxpr
    outputs: tuple[Pieces, ...]
    pieces: Mapping[Var, Pieces]
    boxes: Mapping[Var, Pieces]
    ways: Mapping[Var, Mapping[Box, Narrowed]]


def find_demands(
    jaxpr: Jaxpr,
    *,
    outputs: Sequence[Pieces],
    pieces: Mapping[Var, Pieces],
    through: Callable[[JaxprEqn], bool],
) -> Demands:
    """Find what is read of each value of `jaxpr`.

    Args:
      jaxpr: the whole.
      outputs: the boxes that are wanted of each result.
      pieces: values, inputs among them, that only ever exist in these parts.
      through: whether an equation may be computed in parts.
    """
    boxes: dict[Var, dict[Box, None]] = {}
    ways: dict[Var, dict[Box, Narrowed]] = {}

    known = {v: frozenset(p) for v, p in pieces.items()}

    def demand(atom: Atom, box: Box) -> None:
        if not isinstance(atom, Var):
            return
        cut = [box]
        if atom in known and box not in known[atom]:
            cut = [p for p in pieces[atom] if meet(p, box) is not None]
        boxes.setdefault(atom, {}).update(dict.fromkeys(cut))

    for atom, wanted in zip(jaxpr.outvars, outputs, strict=True):
        for box in wanted:
            demand(atom, box)
    for eqn in reversed(jaxpr.eqns):
        wanted_of = [sorted(boxes.get(v, ())) for v in eqn.outvars]
        if not any(wanted_of):
            continue
        found = {
            (i, box): way
            for i, wanted in enumerate(wanted_of)
            for box in wanted
            if through(eqn) and (way := narrow(eqn, i, box)) is not None
        }
        if len(found) == sum(map(len, wanted_of)):
            for (i, box), way in found.items():
                ways.setdefault(eqn.outvars[i], {})[box] = way
            reads = [way.reads for way in found.values()]
        else:
            reads = [tuple(whole(jaxprs.shape_of(v)) for v in eqn.invars)]
        for each in reads:
            for atom, read in zip(eqn.invars, each, strict=True):
                if read is not None:
                    demand(atom, read)
    return Demands(
        jaxpr=jaxpr,
        outputs=tuple(map(tuple, outputs)),
        pieces=pieces,
        boxes={v: tuple(found) for v, found in boxes.items()},
        ways=ways,
    )


def compute_demands(demands: Demands) -> Jaxpr:
    """Return a jaxpr that computes the boxes that are wanted of the results, and nothing else.

    Every piece of an input, and every box of a result, is an input or result of its own.
    """
    writer = _Writer(demands)
    for eqn in demands.jaxpr.eqns:
        writer.write(eqn)
    outvars = [
        writer.read(atom, box)
        for atom, wanted in zip(demands.jaxpr.outvars, demands.outputs, strict=True)
        for box in wanted
    ]
    return jaxprs.rebuild(
        demands.jaxpr, invars=writer.invars, outvars=outvars, eqns=writer.equations
    )


class _Writer:
    """Writes equations, and knows which variable holds which box of which value."""

    def __init__(self, demands: Demands) -> None:
        self.equations: list[JaxprEqn] = []
        self.invars: list[Var] = []
        self._demands = demands
        self._values: dict[Var, dict[Box, Atom]] = {}
        for v in demands.jaxpr.invars:
            held = {whole(jaxprs.shape_of(v)): v}
            if v in demands.pieces:
                held = {box: jaxprs.variable_like(v, sizes(box)) for box in demands.pieces[v]}
            self._values[v] = dict(held)
            self.invars += held.values()

    def read(self, atom: Atom, box: Box) -> Atom:
        """Return what holds a box of a value, which is cut or put together if need be."""
        if isinstance(atom, Literal):
            return atom
        held = self._values[atom]
        if box not in held:
            all_of_it = whole(jaxprs.shape_of(atom))
            boxes = [all_of_it] if all_of_it in held else self._demands.pieces[atom]
            parts = [(b, held[b]) for b in boxes if meet(b, box) is not None]
            held[box] = assemble(box, parts, cut=self._cut, join=self._join)
        return held[box]

    def write(self, eqn: JaxprEqn) -> None:
        """Write what is demanded of the results of `eqn`."""
        ways = self._demands.ways
        for i, v in enumerate(eqn.outvars):
            for box, way in ways.get(v, {}).items():
                self._values.setdefault(v, {})[box] = self._narrowed(eqn, i, box, way)
        demanded = [v for v in eqn.outvars if v in self._demands.boxes]
        if demanded and ways.keys().isdisjoint(demanded):
            args = [self.read(v, whole(jaxprs.shape_of(v))) for v in eqn.invars]
            self.equations.append(eqn.replace(invars=args))
            self._values.update((v, {whole(jaxprs.shape_of(v)): v}) for v in eqn.outvars)

    def _narrowed(self, eqn: JaxprEqn, result: int, box: Box, way: Narrowed) -> Atom:
        """Return what holds one box of a result, written now."""
        pairs = [(v, r) for v, r in zip(eqn.invars, way.reads, strict=True) if r is not None]
        if way.is_read:
            return self.read(*pairs[0])
        parts = [pairs]
        if eqn.primitive.name in REDUCTIONS:
            parts = [[(v, each)] for v, r in pairs for each in self._reduced_alike(eqn, v, r)]
        values: list[Atom] = []
        for part in parts:
            args = [self.read(*pair) for pair in part]
            new = jaxprs.resized(eqn, invars=args, shape=sizes(box), params=way.params)
            self.equations.append(new)
            values.append(new.outvars[result])
        if len(values) == 1:
            return values[0]
        return self._apply(
            functools.partial(functools.reduce, REDUCTIONS[eqn.primitive.name]), values
        )

    def _reduced_alike(self, eqn: JaxprEqn, v: Atom, box: Box) -> Pieces:
        """Return boxes whose reductions can be combined to that of `box`."""
        pieces = self._demands.pieces.get(v, ()) if isinstance(v, Var) else ()
        parts = tuple(part for p in pieces if (part := meet(p, box)) is not None)
        kept = [axis for axis in range(len(box)) if axis not in eqn.params["axes"]]
        alike = all(part[axis] == box[axis] for part in parts for axis in kept)
        return parts if parts and alike else (box,)

    def _cut(self, value: Atom, box: Box) -> Atom:
        starts, stops = zip(*box, strict=True)
        return self._apply(lambda xs: jax.lax.slice(xs[0], starts, stops), [value])

    def _join(self, values: Sequence[Atom], axis: int) -> Atom:
        return self._apply(lambda xs: jax.lax.concatenate(xs, axis), values)

    def _apply(self, fun: Callable[[list[Any]], Any], values: Sequence[Atom]) -> Atom:
        eqns, result = jaxprs.applied(fun, values)
        self.equations += eqns
        return result
