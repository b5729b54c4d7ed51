"""Leaves of pytrees that are spread over devices in parts, and the whole again."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from passes.boxes import Box, Pieces, index_text
from passes.boxes import whole as all_of


@jax.tree_util.register_pytree_with_keys_class
class Parts:
    """A leaf in parts: what stands in a training state for parameters of several stages.

    It is a pytree whose leaves are the parts. `np.asarray` and `jaxptis.whole` put it together.

    Attributes:
      arrays: the parts.
      boxes: for each part, its start and stop along each axis of the leaf.
      shape: of the leaf.
    """

    def __init__(self, arrays: Sequence[Any], boxes: Pieces, shape: tuple[int, ...]) -> None:
        self.arrays = tuple(arrays)
        self.boxes = boxes
        self.shape = shape

    @property
    def dtype(self) -> Any:
        """Of the leaf, and of each part."""
        return self.arrays[0].dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the leaf."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the leaf, put together on the host; no copy of a part stays there."""
        array = np.empty(self.shape, self.dtype)
        for box, part in zip(self.boxes, self.arrays, strict=True):
            array[_index(box)] = part.addressable_data(0) if isinstance(part, jax.Array) else part
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return f"Parts(shape={self.shape}, arrays={self.arrays})"

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        names = [index_text(box, self.shape) for box in self.boxes]
        keys = [jax.tree_util.DictKey(name) for name in names]
        return tuple(zip(keys, self.arrays, strict=True)), (self.boxes, self.shape)

    @classmethod
    def tree_unflatten(cls, aux: Any, arrays: Sequence[Any]) -> "Parts":
        return cls(arrays, *aux)


def whole(tree: Any) -> Any:
    """Return a pytree with every leaf that is in parts put together on the host.

    No device holds such a leaf as a whole; it is a NumPy array. Other leaves stay what they are.
    """
    return jax.tree.map(lambda x: np.asarray(x) if is_parts(x) else x, tree, is_leaf=is_parts)


def is_parts(leaf: Any) -> bool:
    """Whether a node of a pytree is a leaf in parts."""
    return isinstance(leaf, Parts)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a pytree, those in parts as they are, and its structure."""
    return jax.tree.flatten(tree, is_leaf=is_parts)


class Cuts:
    """Into which parts the leaves of a pytree are cut."""

    def __init__(self, pieces: Sequence[Pieces], shapes: Sequence[tuple[int, ...]]) -> None:
        """Take the pieces of each leaf, a single one for a whole leaf, and its shape."""
        self.pieces = tuple(pieces)
        self._shapes = tuple(shapes)

    @classmethod
    def of(cls, leaves: Sequence[Any]) -> "Cuts":
        """Return the parts that leaves are in."""
        shapes = [np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape for leaf in leaves]
        pieces = [
            leaf.boxes if is_parts(leaf) else (all_of(shape),)
            for leaf, shape in zip(leaves, shapes, strict=True)
        ]
        return cls(pieces, shapes)

    def cut(self, leaves: Sequence[Any]) -> list[Any]:
        """Return all parts of all leaves, each where its leaf is; a part may be a view."""
        parts: list[Any] = []
        for leaf, pieces in zip(leaves, self.pieces, strict=True):
            parts += [leaf] if len(pieces) == 1 and not is_parts(leaf) else _cut(leaf, pieces)
        return parts

    def join(self, parts: Sequence[Any]) -> list[Any]:
        """Return, from all their parts, the leaves."""
        rest = iter(parts)
        return [
            next(rest) if len(pieces) == 1 else Parts([next(rest) for _ in pieces], pieces, shape)
            for pieces, shape in zip(self.pieces, self._shapes, strict=True)
        ]


def _cut(leaf: Any, pieces: Pieces) -> Sequence[Any]:
    if is_parts(leaf) and leaf.boxes == pieces:
        return leaf.arrays
    if isinstance(leaf, jax.Array):
        return _slices(leaf, pieces)
    array = np.asarray(leaf)  # on the host: from parts of another model, or a NumPy array
    return [array[_index(box)] for box in pieces]


@functools.partial(jax.jit, static_argnums=1)
def _slices(array: jax.Array, pieces: Pieces) -> list[jax.Array]:
    return [array[_index(box)] for box in pieces]


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
