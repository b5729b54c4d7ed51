"""Puts the leaves of pytrees on the devices that hold them, and makes pytrees of what is there."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxptis.executor.compiled import replicated
from jaxptis.executor.draft import Homes
from jaxptis.parts import Parts


def aval_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a leaf, as JAX will see it."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | Parts):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    value = np.asarray(leaf)
    return jax.ShapeDtypeStruct(value.shape, jax.dtypes.canonicalize_dtype(value.dtype))


class Placement:
    """Where each leaf of a pytree lives: one array, with a copy on each of its homes."""

    def __init__(self, homes: Sequence[Homes], devices: Sequence[Any]) -> None:
        self._shardings = [
            replicated([devices[h] for h in places]) if places else None for places in homes
        ]

    def put(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves as arrays on their homes; None for a leaf without one."""
        moved = list(leaves)
        wrong = []
        for i, (leaf, sharding) in enumerate(zip(leaves, self._shardings, strict=True)):
            if sharding is None:
                moved[i] = None
            elif not isinstance(leaf, jax.Array) or leaf.sharding != sharding:
                wrong.append(i)
        if wrong:
            targets = [self._shardings[i] for i in wrong]
            # A NumPy array is copied first: JAX may go on reading it after the call (on CPU for
            # as long as the array lives), and data loaders fill the same array again.
            given = [leaves[i] for i in wrong]
            own = [x if isinstance(x, jax.Array) else np.array(x) for x in given]
            arrays = jax.device_put(own, targets)
            for i, array in zip(wrong, arrays, strict=True):
                moved[i] = array
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
                flat.extend(copies[device] for device in sharding.mesh.devices.flat)
        return flat

    def arrays(self, buffers: Sequence[Any]) -> list[jax.Array]:
        """Return, from the copies that `buffers` would give, the leaves."""
        rest = iter(buffers)
        leaves = []
        for sharding in self._shardings:
            assert sharding is not None
            copies = [next(rest) for _ in range(sharding.num_devices)]
            leaves.append(
                copies[0]
                if len(copies) == 1
                else jax.make_array_from_single_device_arrays(copies[0].shape, sharding, copies)
            )
        return leaves
