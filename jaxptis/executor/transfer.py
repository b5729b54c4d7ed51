"""Transfers between two devices: a `ppermute` over the mesh of the two."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxptis.executor.programs import Aval

Device = Any  # jax.Device


class Transfer:
    """Moves an array of one type from one device to another.

    The two arrays that a transfer starts from, the sender's and a placeholder of the receiver's,
    are the two halves of one array along its first axis. A scalar is given such an axis first.
    """

    def __init__(self, source: Device, target: Device, aval: Aval) -> None:
        """Prepare to compile; `compile` must follow."""
        self._aval = aval
        self._scalar = aval.shape == ()
        shape = aval.shape if aval.shape else (1,)
        self._shape = (2 * shape[0], *shape[1:])
        mesh = Mesh(np.array([source, target]), ("pair",))
        self._sharding = NamedSharding(mesh, PartitionSpec("pair"))
        self._placeholder = jax.device_put(np.zeros(shape, aval.dtype), target)

        def transfer(x: jax.Array) -> jax.Array:
            return jax.lax.ppermute(x, "pair", [(0, 1)])

        mapped = jax.shard_map(
            transfer, mesh=mesh, in_specs=PartitionSpec("pair"), out_specs=PartitionSpec("pair")
        )
        pair = jax.ShapeDtypeStruct(self._shape, aval.dtype, sharding=self._sharding)
        self.lowered = jax.jit(mapped).lower(pair)
        self._reshapes = (source, target)
        self.compiled: Any = None

    @property
    def num_programs(self) -> int:
        return 3 if self._scalar else 1

    def compile(self) -> None:
        """Compile what `__call__` runs."""
        self.compiled = self.lowered.compile()
        if self._scalar:
            source, target = self._reshapes
            self._expand = _reshape(source, (), (1,), self._aval.dtype)
            self._squeeze = _reshape(target, (1,), (), self._aval.dtype)

    def __call__(self, value: jax.Array) -> list[jax.Array]:
        """Return the array on the target device."""
        half = self._expand(value) if self._scalar else value
        pair = jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, [half, self._placeholder]
        )
        received = self.compiled(pair).addressable_shards[1].data
        return [self._squeeze(received) if self._scalar else received]


def _reshape(device: Device, before: tuple[int, ...], after: tuple[int, ...], dtype: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(device)
    aval = jax.ShapeDtypeStruct(before, dtype, sharding=sharding)
    return jax.jit(lambda x: x.reshape(after)).lower(aval).compile()
