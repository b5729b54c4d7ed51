"""Compute a part of a value: what lies between two positions along one of its axes.

The part is computed from parts of what the value is computed from, and so on, through elementwise
arithmetic, changes of shape and matmuls. What anything else makes is computed whole, and sliced.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from passes.jaxprs import JaxprEqn, Literal, Var

# One result, whose elements each depend on the operands' elements at the same place.
_ELEMENTWISE = frozenset(
    """
    add add_any sub mul div rem neg max min abs sign floor ceil round clamp square sqrt rsqrt
    integer_pow pow exp exp2 expm1 log log1p logistic tanh sin cos erf atan2
    select_n eq ne lt le gt ge and or not xor is_finite convert_element_type reduce_precision
    stop_gradient copy
    """.split()  # noqa: SIM905
)
# For each operand the axis along which its part is needed, or None where it is needed whole.
Axes = list[int | None]


def operand_axes(eqn: JaxprEqn, axis: int) -> Axes | None:
    """Return along which axes of its operands a part of the result along `axis` lies.

    None if parts of the result are not computed from parts of the operands.
    """
    name = eqn.primitive.name
    if name in _ELEMENTWISE:
        size = _shape(eqn.outvars[0])[axis]
        return [axis if _shape(v) and _shape(v)[axis] == size else None for v in eqn.invars]
    return _AXES[name](eqn, axis) if name in _AXES else None


def result_axis(eqn: JaxprEqn, operand: int, axis: int) -> int | None:
    """Return the axis of the result that `axis` of an operand becomes, if there is one."""
    for candidate in range(len(_shape(eqn.outvars[0]))):
        axes = operand_axes(eqn, candidate)
        if axes is not None and axes[operand] == axis:
            return candidate
    return None


def bind(eqn: JaxprEqn, operands: Sequence[Any], axis: int, width: int) -> Any:
    """Apply `eqn` to parts of its operands, so that the result has `width` along `axis`."""
    params = dict(eqn.params)
    key = _SHAPES.get(eqn.primitive.name)
    if key is not None:
        params[key] = (*params[key][:axis], width, *params[key][axis + 1 :])
    return eqn.primitive.bind(*operands, **params)


class Part:
    """The values of a program from `start` to `stop` along one of their axes."""

    def __init__(
        self,
        producers: Mapping[Var, JaxprEqn],
        whole: Mapping[Var, Any],
        start: int,
        stop: int,
    ) -> None:
        """Take the equation that makes each value, and the values that may be needed whole."""
        self.start, self.stop = start, stop
        self._producers = producers
        self._whole = whole
        self._made: dict[tuple[Var, int], Any] = {}

    @property
    def width(self) -> int:
        return self.stop - self.start

    def whole(self, atom: Var | Literal) -> Any:
        return self._whole[atom] if isinstance(atom, Var) else atom.val

    def of(self, v: Var, axis: int) -> Any:
        """Return the part of `v` along `axis`; each is computed once."""
        if (v, axis) not in self._made:
            self._made[v, axis] = self._compute(v, axis)
        return self._made[v, axis]

    def _compute(self, v: Var, axis: int) -> Any:
        eqn = self._producers.get(v)
        axes = None if eqn is None else operand_axes(eqn, axis)
        if eqn is None or axes is None:
            return jax.lax.slice_in_dim(self.whole(v), self.start, self.stop, axis=axis)
        operands = [
            self.whole(u) if a is None or isinstance(u, Literal) else self.of(u, a)
            for u, a in zip(eqn.invars, axes, strict=True)
        ]
        made = bind(eqn, operands, axis, self.width)
        counts = eqn.primitive.name == "iota" and eqn.params["dimension"] == axis
        return made + jax.lax.full((), self.start, made.dtype) if counts else made


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape


def _broadcast_axes(eqn: JaxprEqn, axis: int) -> Axes:
    dimensions = eqn.params["broadcast_dimensions"]
    source = dimensions.index(axis) if axis in dimensions else None
    repeated = source is None or _shape(eqn.invars[0])[source] == 1
    return [None if repeated else source]


def _reshape_axes(eqn: JaxprEqn, axis: int) -> Axes | None:
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    for source, size in enumerate(before):
        if size == after[axis] and math.prod(before[:source]) == math.prod(after[:axis]):
            return [source]
    return None


def _squeeze_axes(eqn: JaxprEqn, axis: int) -> Axes:
    dropped = eqn.params["dimensions"]
    return [[i for i in range(len(_shape(eqn.invars[0]))) if i not in dropped][axis]]


def _slice_axes(eqn: JaxprEqn, axis: int) -> Axes | None:
    return [axis] if _shape(eqn.invars[0])[axis] == _shape(eqn.outvars[0])[axis] else None


def _matmul_axes(eqn: JaxprEqn, axis: int) -> Axes:
    contracted, batch = eqn.params["dimension_numbers"]
    if axis < len(batch[0]):
        return [batch[0][axis], batch[1][axis]]
    free = [
        (side, i)
        for side in (0, 1)
        for i in range(len(_shape(eqn.invars[side])))
        if i not in contracted[side] and i not in batch[side]
    ]
    side, i = free[axis - len(batch[0])]
    return [i, None] if side == 0 else [None, i]


_AXES: Mapping[str, Callable[[JaxprEqn, int], Axes | None]] = {
    "broadcast_in_dim": _broadcast_axes,
    "dot_general": _matmul_axes,
    "iota": lambda eqn, axis: [],
    "reshape": _reshape_axes,
    "slice": _slice_axes,
    "squeeze": _squeeze_axes,
    "transpose": lambda eqn, axis: [eqn.params["permutation"][axis]],
}
# Parameters of primitives that hold the shape of the result.
_SHAPES = {
    "broadcast_in_dim": "shape",
    "iota": "shape",
    "reshape": "new_sizes",
    "slice": "limit_indices",
}
