"""Cut the head: the matmul into a large vocabulary, and the cross-entropy behind it, in slices.

A softmax cross-entropy reads the logits z of a token by reductions along the vocabulary only: their
maximum, a sum of exponentials, the logit of the target. So it can be computed slice by slice,
carrying the maximum m so far, the sum s of exp(z - m) so far, and the target's logit t if it has
been met (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3):

    m' = max(m, max z)        s' = s exp(m - m') + sum exp(z - m')        t' = t + z[target]

Differentiating this as it stands, with m as a constant, gives the gradients of the loss: log s + m
depends on z, but not on the m that was chosen.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax

from passes import jaxprs
from passes.drop_dead import drop_dead
from passes.inline_calls import inline_calls
from passes.jaxprs import JaxprEqn, Var
from passes.origins import Origin, find_origins
from passes.program import Program
from passes.read_logits import LogitsReader, NotAHead, Values
from passes.reductions import Reduction
from passes.slice_values import Part, operand_axes


def slice_head(program: Program) -> Program:
    """Cut the last head into `program.head_slices` slices, one behind the other.

    Raises:
      ValueError: no matmul by a parameter is read by a softmax cross-entropy and by nothing else,
        or its vocabulary has fewer entries than slices are wanted.
    """
    if program.head_slices == 1:
        return program
    head = _find_head(program)
    count, eqns = program.head_slices, program.jaxpr.eqns
    if count > head.size:
        raise ValueError(
            f"head_slices is {count}, but the head, {jaxprs.located(head.matmul)}, has a "
            f"vocabulary of {head.size}; lower head_slices to {head.size} or less"
        )

    def sliced(*args: Any) -> list[Any]:
        values = Values(program.jaxpr, args)
        values.run(eqns[: eqns.index(head.matmul)])
        reduced: list[Any] = [None] * len(head.reductions)
        for start, stop in pairwise(i * head.size // count for i in range(count + 1)):
            part = Part(values.producers, values, start, stop)
            reduced = [f(part, before) for f, before in zip(head.reductions, reduced, strict=True)]
        return LogitsReader(head.logits, head.axis, values, reduced).run()

    jaxpr, constants, _ = jaxprs.trace(sliced, *jaxprs.avals(program.jaxpr.invars))
    constants = [*constants, *program.constants]
    chain = dataclasses.replace(program, jaxpr=jaxpr, constants=tuple(constants), head_slices=1)
    return drop_dead(inline_calls(chain))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
    """A matmul, the axis of its result that is the vocabulary, and how the loss reduces it."""

    matmul: JaxprEqn
    axis: int
    reductions: Sequence[Reduction]

    @property
    def logits(self) -> Var:
        return self.matmul.outvars[0]

    @property
    def size(self) -> int:
        (aval,) = jaxprs.avals([self.logits])
        return aval.shape[self.axis]


class _Zeros(Values):
    """Stands for values where only their types matter."""

    def __missing__(self, v: Var) -> Any:
        (aval,) = jaxprs.avals([v])
        return jax.lax.full(aval.shape, 0, aval.dtype)


def _find_head(program: Program) -> _Head:
    refused: list[tuple[JaxprEqn, NotAHead]] = []
    for matmul, axis in _candidates(program):
        reader = LogitsReader(matmul.outvars[0], axis, _Zeros(program.jaxpr, ()), None)
        try:
            jaxprs.trace(reader.run)
            if not reader.has_softmax:
                raise NotAHead("no sum of its exponentials is taken")
        except NotAHead as error:
            refused.append((matmul, error))
        else:
            return _Head(matmul=matmul, axis=axis, reductions=reader.reductions)
    message = (
        f"head_slices is {program.head_slices}, which needs a matmul by a parameter whose result "
        "only a softmax cross-entropy reads, but "
    )
    if not refused:
        raise ValueError(f"{message}there is no matmul by a parameter; set head_slices to 1")
    matmul, why = max(refused, key=lambda each: jaxprs.nbytes(v.aval for v in each[0].outvars))
    raise ValueError(
        f"{message}the one with the largest result, {jaxprs.located(matmul)}, is not such: "
        f"{why}; change that, or set head_slices to 1"
    )


def _candidates(program: Program) -> Iterator[tuple[JaxprEqn, int]]:
    """Yield the matmuls by a parameter, the last first, with each axis that the parameter gives.

    One whose result reaches another is no head: that makes the search short.
    """
    origins = find_origins(program)
    read_later: set[Var] = set()  # by one of the matmuls, or by what computes its operands
    for eqn in reversed(program.jaxpr.eqns):
        axes = _param_axes(eqn, origins)
        reaches = not read_later.isdisjoint(eqn.outvars)
        if axes or reaches:
            read_later.update(jaxprs.reads(eqn))
        if not reaches:
            yield from ((eqn, axis) for axis in axes)


def _param_axes(eqn: JaxprEqn, origins: Mapping[Var, Origin]) -> list[int]:
    """Return the axes of a matmul's result that come from a parameter; none of other equations."""
    if eqn.primitive.name != "dot_general" or Origin.ACTIVATION not in origins[eqn.outvars[0]]:
        return []
    (aval,) = jaxprs.avals(eqn.outvars)
    found = []
    for axis, size in enumerate(aval.shape):
        sides = zip(jaxprs.reads(eqn), operand_axes(eqn, axis) or [], strict=True)
        if size > 1 and [origins[v] for v, a in sides if a is not None] == [Origin.PARAMS]:
            found.append(axis)
    return found
