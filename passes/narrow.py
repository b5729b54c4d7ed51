"""What an equation must read, and how it changes, to compute a part of its result only."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from passes.boxes import Box, meet, reshaped, shifted, sizes, whole
from passes.jaxprs import JaxprEqn, shape_of

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt igamma imag integer_pow is_finite le lgamma log log1p logistic lt max min mul
    ne neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
    sub tan tanh threefry2x32 xor
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Narrowed:
    """An equation that computes a part of its result.

    Attributes:
      reads: the box that it reads of each of its inputs; None for an input that it does not read.
      params: parameters of the primitive that change.
      is_read: whether it has nothing to do, since what it reads is already the result.
    """

    reads: tuple[Box | None, ...]
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_read: bool = False


def narrow(eqn: JaxprEqn, result: int, box: Box) -> Narrowed | None:
    """Return how to compute `box` of a result of `eqn`; None if only the whole can be computed."""
    rule = _elementwise if eqn.primitive.name in ELEMENTWISE else _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, result, box)


def _elementwise(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    """A scalar is read whole, and so is an axis of size 1, along which an operand is repeated."""
    return Narrowed(
        reads=tuple(
            tuple((0, 1) if n == 1 else span for n, span in zip(shape_of(v), box, strict=False))
            for v in eqn.invars
        )
    )


def _bitcast(eqn: JaxprEqn, result: int, box: Box) -> Narrowed | None:
    same = shape_of(eqn.invars[0]) == shape_of(eqn.outvars[0])
    return _elementwise(eqn, result, box) if same else None


def _rev(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    flipped, shape = eqn.params["dimensions"], shape_of(eqn.invars[0])
    spans = enumerate(zip(box, shape, strict=True))
    read = tuple((n - b, n - a) if axis in flipped else (a, b) for axis, ((a, b), n) in spans)
    return Narrowed(reads=(read,))


def _transpose(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    spans = dict(zip(eqn.params["permutation"], box, strict=True))
    return Narrowed(reads=(tuple(spans[axis] for axis in range(len(box))),))


def _broadcast_in_dim(eqn: JaxprEqn, result: int, box: Box) -> Narrowed | None:
    if len(eqn.invars) > 1:  # a shape that is computed
        return None
    axes, shape = eqn.params["broadcast_dimensions"], shape_of(eqn.invars[0])
    read = tuple((0, 1) if n == 1 else box[axis] for axis, n in zip(axes, shape, strict=True))
    return Narrowed(reads=(read,), params={"shape": sizes(box)})


def _reshape(eqn: JaxprEqn, result: int, box: Box) -> Narrowed | None:
    if eqn.params["dimensions"] is not None or len(eqn.invars) > 1:
        return None
    read = reshaped(box, shape_of(eqn.outvars[0]), shape_of(eqn.invars[0]))
    return None if read is None else Narrowed(reads=(read,), params={"new_sizes": sizes(box)})


def _squeeze(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    rest = iter(box)
    shape, gone = shape_of(eqn.invars[0]), eqn.params["dimensions"]
    read = tuple((0, 1) if axis in gone else next(rest) for axis in range(len(shape)))
    return Narrowed(reads=(read,))


def _slice(eqn: JaxprEqn, result: int, box: Box) -> Narrowed | None:
    if any(step != 1 for step in eqn.params["strides"] or ()):
        return None
    return Narrowed(reads=(shifted(box, eqn.params["start_indices"]),), is_read=True)


def _split(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    start = [0] * len(box)
    start[eqn.params["axis"]] = int(sum(eqn.params["sizes"][:result]))
    return Narrowed(reads=(shifted(box, start),), is_read=True)


def _concatenate(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    axis = eqn.params["dimension"]
    reads: list[Box | None] = []
    start = [0] * len(box)
    for v in eqn.invars:
        common = meet(box, shifted(whole(shape_of(v)), start))
        reads.append(None if common is None else shifted(common, [-n for n in start]))
        start[axis] += shape_of(v)[axis]
    return Narrowed(reads=tuple(reads), is_read=len(reads) - reads.count(None) == 1)


def _reduce(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    rest = iter(box)
    shape, gone = shape_of(eqn.invars[0]), eqn.params["axes"]
    read = tuple((0, n) if axis in gone else next(rest) for axis, n in enumerate(shape))
    return Narrowed(reads=(read,))


def _random(eqn: JaxprEqn, result: int, box: Box) -> Narrowed | None:
    """Keys are independent of each other; what is drawn from one key is drawn at once."""
    shape = shape_of(eqn.invars[0])
    each, drawn = box[: len(shape)], box[len(shape) :]
    if sizes(drawn) != shape_of(eqn.outvars[0])[len(shape) :]:
        return None
    return Narrowed(reads=(each,))


def _random_wrap(eqn: JaxprEqn, result: int, box: Box) -> Narrowed:
    words = shape_of(eqn.invars[0])[len(box) :]
    return Narrowed(reads=((*box, *whole(words)),))


_RULES: dict[str, Callable[[JaxprEqn, int, Box], Narrowed | None]] = {
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "random_bits": _random,
    "random_split": _random,
    "random_unwrap": _random,
    "random_wrap": _random_wrap,
    "reduce_and": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_or": _reduce,
    "reduce_prod": _reduce,
    "reduce_sum": _reduce,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
