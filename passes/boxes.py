"""Boxes: parts of an array, from a start to a stop along each axis."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Box = tuple[tuple[int, int], ...]
Pieces = tuple[Box, ...]  # of one array
T = TypeVar("T")


def whole(shape: Sequence[int]) -> Box:
    """Return the box of all of an array."""
    return tuple((0, int(n)) for n in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """Return the shape of a part."""
    return tuple(stop - start for start, stop in box)


def shifted(box: Box, by: Sequence[int]) -> Box:
    """Return the box `by` so many places further along each axis."""
    return tuple((a + n, b + n) for (a, b), n in zip(box, by, strict=True))


def meet(box: Box, other: Box) -> Box | None:
    """Return what two boxes have in common; None for nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    return common if all(a < b for a, b in common) else None


def index_text(box: Box, shape: Sequence[int]) -> str:
    """Return the box as an index without spaces, such as `[4]` or `[:,0:64]`; empty for all."""
    terms = [
        ":" if (a, b) == (0, n) else f"{a}" if b == a + 1 else f"{a}:{b}"
        for (a, b), n in zip(box, shape, strict=True)
    ]
    while terms and terms[-1] == ":":
        terms.pop()
    return f"[{','.join(terms)}]" if terms else ""


def partition(box: Box, reads: Iterable[Box]) -> list[Box]:
    """Cut `box` so that each of `reads`, which lie in it, is made of pieces, as few as possible.

    A box that has less than two different reads, or one whole, stays as it is.
    """
    reads = list(dict.fromkeys(reads))
    if len(reads) < 2:
        return [box]
    for axis, span in enumerate(box):
        if any(read[axis] == span for read in reads):
            continue
        edges = sorted({*span, *(edge for read in reads for edge in read[axis])})
        pieces: list[Box] = []
        for part in itertools.pairwise(edges):
            piece = (*box[:axis], part, *box[axis + 1 :])
            inside = [common for read in reads if (common := meet(read, piece)) is not None]
            pieces += partition(piece, inside)
        return pieces
    return [box]


def assemble(
    box: Box,
    pieces: Sequence[tuple[Box, T]],
    *,
    cut: Callable[[T, Box], T],
    join: Callable[[Sequence[T], int], T],
) -> T:
    """Put a box together.

    Args:
      box: what is wanted.
      pieces: boxes, from cuts all the way through, and their values; those that meet `box`.
      cut: returns a part, at the given box inside of it, of a value.
      join: concatenates values along an axis.
    """
    if len(pieces) == 1:
        ((have, value),) = pieces
        starts = [-start for start, _ in have]
        return value if have == box else cut(value, shifted(box, starts))
    for axis, span in enumerate(box):
        groups = _groups(pieces, axis)
        if len(groups) > 1:
            parts = []
            for group in groups:
                start = max(span[0], min(have[axis][0] for have, _ in group))
                stop = min(span[1], max(have[axis][1] for have, _ in group))
                part = (*box[:axis], (start, stop), *box[axis + 1 :])
                parts.append(assemble(part, group, cut=cut, join=join))
            return join(parts, axis)
    raise AssertionError(f"{box} is not cut all the way through: {pieces}")


def _groups(pieces: Sequence[tuple[Box, T]], axis: int) -> list[list[tuple[Box, T]]]:
    """Return the pieces between cuts along `axis`, in order."""
    groups: list[list[tuple[Box, T]]] = []
    end = -1
    for have, value in sorted(pieces, key=lambda piece: piece[0][axis]):
        start, stop = have[axis]
        if not groups or start >= end:
            groups.append([])
        groups[-1].append((have, value))
        end = max(end, stop)
    return groups


def reshaped(box: Box, shape: Sequence[int], new_shape: Sequence[int]) -> Box | None:
    """Return the box of the same elements after a reshape; None if they are no box there."""
    if 0 in shape:
        return None
    result: list[tuple[int, int]] = []
    i = j = 0
    while i < len(shape) or j < len(new_shape):
        first, new_first = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(new_shape))
        while math.prod(shape[first:i]) != math.prod(new_shape[new_first:j]):
            if math.prod(shape[first:i]) < math.prod(new_shape[new_first:j]):
                i += 1
            else:
                j += 1
        span = _flat(box[first:i], shape[first:i])
        part = None if span is None else _box(span, new_shape[new_first:j])
        if part is None:
            return None
        result += part
    return tuple(result)


def _flat(box: Box, shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the elements of a box as a range, counted row by row; None if there are gaps."""
    first = last = 0
    for (start, stop), n in zip(box, shape, strict=True):
        first, last = first * n + start, last * n + stop - 1
    return (first, last + 1) if last + 1 - first == math.prod(sizes(box)) else None


def _box(span: tuple[int, int], shape: Sequence[int]) -> Box | None:
    """Return a range of elements, counted row by row, as a box; None if it is none."""
    first, last = span[0], span[1] - 1
    box: list[tuple[int, int]] = []
    for n in reversed(shape):
        (first, start), (last, stop) = divmod(first, n), divmod(last, n)
        box.append((start, stop + 1))
    return tuple(box[::-1]) if math.prod(sizes(tuple(box))) == span[1] - span[0] else None
