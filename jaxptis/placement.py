"""Puts the leaves of pytrees on the devices that hold them, and makes pytrees of what is there."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxptis.executor.compiled import replicated
from jaxptis.executor.draft import Homes
from jaxptis.parts import Parts
from jaxptis.processes import is_local


def aval_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a leaf, as JAX will see it; one with a NumPy dtype is not read."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | Parts):
        weak = getattr(leaf, "weak_type", False)  # keys and parts have no such attribute
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)
    # Not so arrays of others, such as a DataLoader's: their dtypes are not NumPy's.
    described = hasattr(leaf, "shape") and isinstance(getattr(leaf, "dtype", None), np.dtype)
    value = leaf if described else np.asarray(leaf)
    return jax.ShapeDtypeStruct(
        value.shape,
        jax.dtypes.canonicalize_dtype(value.dtype),
        weak_type=isinstance(leaf, int | float | complex) and not isinstance(leaf, bool),
    )


class Placement:
    """Where each leaf of a pytree lives: one array, with a copy on each of its homes.

    A process holds the copies on its own devices. A leaf that has none there is still an array: it
    can be handed on, but not read. Among copies, one elsewhere is such an array, too, or None.
    """

    def __init__(self, homes: Sequence[Homes], devices: Sequence[Any]) -> None:
        places = [[devices[h] for h in each] for each in homes]
        self._shardings = [replicated(each) if each else None for each in places]
        self._local = [[replicated([d]) for d in each if is_local(d)] for each in places]

    @property
    def num_copies(self) -> int:
        """How many copies all leaves have together."""
        return sum(0 if each is None else each.num_devices for each in self._shardings)

    @property
    def is_local(self) -> bool:
        """Whether this process has any of the copies."""
        return any(self._local)

    def put(self, leaves: Sequence[Any], *, copy: bool = False) -> list[Any]:
        """Return the leaves as arrays on their homes; None for a leaf without one.

        Args:
          leaves: arrays, or what NumPy makes arrays of.
          copy: whether also a leaf that is in place is copied.

        Raises:
          ValueError: a leaf is needed here, but other processes have it.
        """
        moved = list(leaves)
        wrong = []
        for i, (leaf, sharding) in enumerate(zip(leaves, self._shardings, strict=True)):
            if sharding is None:
                moved[i] = None
            elif copy or not isinstance(leaf, jax.Array) or leaf.sharding != sharding:
                wrong.append(i)
        if wrong:
            needed = {i: _readable(leaves[i]) for i in wrong if self._local[i]}
            targets = {i: self._local[i] for i in needed}
            sources = {i: [needed[i]] * len(targets[i]) for i in needed}
            copies = jax.device_put(sources, targets, may_alias=False if copy else None)
            for i in wrong:
                sharding, aval = self._shardings[i], aval_of(leaves[i])
                assert sharding is not None
                moved[i] = _array(aval, sharding, copies.get(i, []))
        return moved

    def buffers(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the copies of leaves that are in place, leaf by leaf, home by home."""
        flat = []
        for leaf, sharding in zip(leaves, self._shardings, strict=True):
            if sharding is None:
                continue
            if sharding.num_devices == 1:
                flat.append(leaf)
            else:
                copies = {shard.device: shard.data for shard in leaf.addressable_shards}
                flat.extend(copies.get(device) for device in sharding.mesh.devices.flat)
        return flat

    def arrays(self, buffers: Sequence[Any]) -> list[jax.Array]:
        """Return, from the copies that `buffers` would give, the leaves."""
        rest = iter(buffers)
        leaves = []
        for sharding in self._shardings:
            assert sharding is not None
            copies = [next(rest) for _ in range(sharding.num_devices)]
            local = [copy for copy in copies if copy.is_fully_addressable]
            leaves.append(_array(copies[0], sharding, local))
        return leaves


def _array(aval: Any, sharding: NamedSharding, copies: Sequence[jax.Array]) -> jax.Array:
    """Return a leaf of a type, of which this process has these copies."""
    if sharding.num_devices == len(copies) == 1:
        return copies[0]
    return jax.make_array_from_single_device_arrays(
        aval.shape, sharding, list(copies), dtype=aval.dtype
    )


def _readable(leaf: Any) -> Any:
    """Return what a leaf can be copied from.

    A NumPy array is copied first: JAX may go on reading it after the call (on CPU for as long as
    the array lives), and data loaders fill the same array again.
    """
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    if leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated and leaf.addressable_shards:
        return leaf.addressable_data(0)
    raise ValueError(
        f"process {jax.process_index()} needs an array of shape {leaf.shape} that only other "
        "processes have; pass arrays where this pipeline puts them, or the same host arrays in "
        "every process"
    )
