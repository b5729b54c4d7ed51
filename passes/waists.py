"""Find where a dataflow is narrow.

At each position between two equations, the live activations are counted. Two things keep the count
honest. What is only on its way out (an auxiliary loss, for which nothing but sums is left to do) is
not counted. And values made from one activation without parameters (a norm of the residual stream,
the routing of a router's logits) count as that activation: they could be computed again from it.

Remat and functions with custom rules are looked into, but they are equations: there is no position
inside of them.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence, Set

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Var
from passes.origins import Origin, called_body, is_heavy, origins_inside


@dataclasses.dataclass(frozen=True)
class Waist:
    """A narrow place.

    Attributes:
      position: it is between the equations `position - 1` and `position`.
      live_bytes: bytes of the activations that later work reads.
    """

    position: int
    live_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """An equation on activations; values have numbers, because a body may be called twice."""

    owner: int  # position of the equation that it is, or is inside of
    reads: frozenset[int]
    makes: tuple[int, ...]
    is_heavy: bool


class Dataflow:
    """The flow of activations through equations.

    Args:
      eqns: those that make activations, in order.
      origins: what each value is computed from.
    """

    def __init__(self, eqns: Sequence[JaxprEqn], origins: dict[Var, Origin]):
        self._steps: list[_Step] = []
        self._sizes: list[int] = []
        numbers: dict[Var, int] = {}
        for position, eqn in enumerate(eqns):
            self._add(eqn, origins, numbers, position)
        self._owners = [step.owner for step in self._steps]
        self._live = list(_live_for_work(self._steps))
        self._anchors: dict[int, int] = {}
        self._held = list(self._anchored())

    @property
    def heavy(self) -> list[int]:
        """The positions of the equations that work with parameters."""
        return sorted({step.owner for step in self._steps if step.is_heavy})

    def waists(self) -> list[Waist]:
        """Return the narrow places between the first and the last heavy equation.

        A place is narrow where a single activation is live. With others that pass by (an encoder's
        output, keys and values of an earlier layer), it is narrow between blocks: on both sides
        the flow widens before it is narrower.
        """
        found: list[Waist] = []
        before: int | None = None  # the last step before a waist on the near side of heavy work
        for first, second in itertools.pairwise(self.heavy):
            between = [
                bisect.bisect_left(self._owners, p) - 1 for p in range(first + 1, second + 1)
            ]
            narrow = [
                step
                for step in between
                if len(self._held[step]) == 1 or self._is_between_blocks(step, before)
            ]
            found += [
                Waist(self._owners[step] + 1, sum(self._sizes[v] for v in self._live[step]))
                for step in narrow
            ]
            before = narrow[-1] if narrow else before
        return found

    def _add(
        self, eqn: JaxprEqn, origins: dict[Var, Origin], numbers: dict[Var, int], owner: int
    ) -> None:
        """Append the step that `eqn` is, or those inside of it."""
        body = called_body(eqn)
        if body is None:
            reads = frozenset(numbers[v] for v in jaxprs.reads(eqn) if v in numbers)
            makes = tuple(self._number(v, numbers) for v in eqn.outvars)
            heavy = is_heavy(eqn, origins)
            self._steps.append(_Step(owner=owner, reads=reads, makes=makes, is_heavy=heavy))
            return
        inside = origins_inside(eqn, body, origins)
        inner = _numbers_inside(eqn, body, numbers)
        for each in body.eqns:
            if any(Origin.ACTIVATION in inside[v] for v in each.outvars):
                self._add(each, inside, inner, owner)
        for var, result in zip(eqn.outvars, body.outvars, strict=True):
            if isinstance(result, Var) and result in inner:
                numbers[var] = inner[result]

    def _number(self, var: Var, numbers: dict[Var, int]) -> int:
        numbers[var] = len(self._sizes)
        self._sizes.append(jaxprs.nbytes([var.aval]))
        return numbers[var]

    def _anchored(self) -> Iterator[dict[int, int]]:
        """Yield, after each step, the values that are held, and the bytes of each."""
        anchors = self._anchors
        for step, live in zip(self._steps, self._live, strict=True):
            sources = {anchors[v] for v in step.reads}
            follows = len(sources) == 1 and not step.is_heavy
            anchors.update((v, min(sources) if follows else v) for v in step.makes)
            held: dict[int, int] = {}
            for v in live:
                held[anchors[v]] = held.get(anchors[v], 0) + self._sizes[v]
            yield {a: min(self._sizes[a], nbytes) for a, nbytes in held.items()}

    def _is_between_blocks(self, here: int, last: int | None) -> bool:
        """Whether the flow widens on both sides of `here`, the waist before which is `last`."""
        held = self._held[here]
        passing = held.keys() & self._held[last].keys() if last is not None else set()
        total = sum(held.values())
        if last is not None and self._is_wide_branch(here, last, passing):
            return False
        # One stream beside what passes by is a common sight; several must stand out more.
        needed = total / 4 if len(held) - len(passing) <= 1 else total
        wide = _bytes_without(held, passing) + needed
        start = -1 if last is None else last
        sides = range(here - 1, start, -1), range(here + 1, len(self._held))
        return all(self._widens(side, passing, total, wide) for side in sides)

    def _is_wide_branch(self, here: int, last: int, passing: Set[int]) -> bool:
        """Whether all of `last` passes by, and what does not comes only from it and is larger.

        So is what experts hold between their matmuls, beside the residual stream.
        """
        held = self._held[here]
        kept = sum(held[v] for v in passing)
        if kept < sum(self._held[last].values()) or _bytes_without(held, passing) <= kept:
            return False
        others = {v for v in self._live[last] if self._anchors[v] not in passing}
        for step in self._steps[last + 1 : here + 1]:
            if not step.reads or not others.isdisjoint(step.reads):
                others.update(step.makes)
        return others.isdisjoint(v for v in self._live[here] if self._anchors[v] not in passing)

    def _widens(self, side: range, passing: set[int], total: int, wide: float) -> bool:
        """Whether, going along `side`, what does not pass by is `wide` before all is < `total`."""
        for step in side:
            # A head is wide, although its logits may be only on their way out.
            leaving = [v for v in self._steps[step].makes if v not in self._live[step]]
            out = sum(self._sizes[v] for v in leaving) if self._steps[step].is_heavy else 0
            if sum(self._held[step].values()) + out < total:
                return False
            if _bytes_without(self._held[step], passing) + out >= wide:
                return True
        return False


def _bytes_without(held: dict[int, int], passing: Set[int]) -> int:
    return sum(nbytes for v, nbytes in held.items() if v not in passing)


def _live_for_work(steps: Sequence[_Step]) -> Iterator[frozenset[int]]:
    """Yield the values, after each step, from which a heavy step is still to be reached."""
    last_read: dict[int, int] = {}
    for i, step in reversed(list(enumerate(steps))):
        if step.is_heavy or any(v in last_read for v in step.makes):
            for v in step.reads:
                last_read.setdefault(v, i)
    live: frozenset[int] = frozenset()
    for i, step in enumerate(steps):
        made = {v for v in step.makes if v in last_read}
        live = frozenset(v for v in live | made if last_read[v] > i)
        yield live


def _numbers_inside(eqn: JaxprEqn, body: Jaxpr, numbers: dict[Var, int]) -> dict[Var, int]:
    operands = zip(body.invars, eqn.invars, strict=True)
    return {
        v: numbers[operand]
        for v, operand in operands
        if not isinstance(operand, Literal) and operand in numbers
    }
