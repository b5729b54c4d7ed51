"""Transfers between two devices: a `ppermute` over the mesh of the two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxptis.executor.programs import Aval
from jaxptis.processes import is_local

Device = Any  # jax.Device


@dataclass(frozen=True)
class Route:
    """What crosses together between two devices: the types that each of them sends, in order."""

    devices: tuple[int, int]
    sends: tuple[tuple[Aval, ...], tuple[Aval, ...]]


@dataclass(frozen=True)
class _Lane:
    """An array of each of the two devices; for each the value that it sends by it, if any."""

    aval: Aval
    sends: tuple[int | None, int | None]


class Exchange:
    """Moves values between two devices, in both directions at once.

    Two values of one type in opposite directions share a lane, and so a `ppermute`. Where only one
    device sends, the other's array is a placeholder.
    """

    def __init__(
        self, route: Route, devices: Sequence[Device], placeholder: Callable[[int, Aval], Any]
    ) -> None:
        """Lower the program; `compile` must follow.

        A process runs its own end, or both. It compiles without the other.

        Args:
          route: what crosses.
          devices: all devices of the pipeline.
          placeholder: returns an array of a type on a device; its value does not matter.
        """
        lanes = _lanes(route)
        mesh = Mesh(np.array([devices[d] for d in route.devices]), ("pair",))
        # Every shape, also a scalar, has a shard on each device in this sharding. It calls the
        # shards equal, which they are not; nobody looks at the array as a whole.
        sharding = NamedSharding(mesh, PartitionSpec())
        self._sharding = sharding
        # The CPU backend runs what is ready in any order, but between processes only the order says
        # which message is which: there one transfer is over before the next may start.
        self._in_turn = devices[0].platform == "cpu" and jax.process_count() > 1
        local = [end for end in (0, 1) if is_local(devices[route.devices[end]])]
        count = len(route.sends[0]) if 0 not in local else 0  # sent elsewhere, by the first device
        self._inputs = [
            (
                lane.aval,
                [
                    placeholder(route.devices[end], lane.aval) if sent is None else sent - count
                    for end, sent in enumerate(lane.sends)
                    if end in local
                ],
            )
            for lane in lanes
        ]
        self._outputs = sorted(
            (sent, index, local.index(1 - end))
            for index, lane in enumerate(lanes)
            for end, sent in enumerate(lane.sends)
            if sent is not None and 1 - end in local
        )

        def transfer(*values: jax.Array) -> list[jax.Array]:
            return [
                jax.lax.ppermute(
                    x, "pair", [(i, 1 - i) for i in (0, 1) if lane.sends[i] is not None]
                )
                for x, lane in zip(values, lanes, strict=True)
            ]

        mapped = jax.shard_map(
            transfer,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        avals = [Aval(lane.aval.shape, lane.aval.dtype, sharding=sharding) for lane in lanes]
        self.lowered = jax.jit(mapped).lower(*avals)
        self.compiled: Any = None

    def compile(self) -> None:
        """Compile what `__call__` runs."""
        self.compiled = self.lowered.compile()

    def __call__(self, *values: jax.Array) -> list[jax.Array]:
        """Return what arrives at devices of this process, in the order in which it is sent.

        Args:
          *values: what the first device sends, then what the second does, if they are local.
        """
        arrays = [
            jax.make_array_from_single_device_arrays(
                aval.shape,
                self._sharding,
                [values[x] if isinstance(x, int) else x for x in ends],
                dtype=aval.dtype,
            )
            for aval, ends in self._inputs
        ]
        if self._in_turn:
            jax.block_until_ready(arrays)
        arrived = self.compiled(*arrays)
        if self._in_turn:
            jax.block_until_ready(arrived)
        return [arrived[lane].addressable_shards[index].data for _, lane, index in self._outputs]


def _lanes(route: Route) -> list[_Lane]:
    """Give each value a lane; opposite values of one type share one."""
    first, second = route.sends
    back = dict(enumerate(second, start=len(first)))
    lanes = []
    for index, aval in enumerate(first):
        partner = next((k for k, other in back.items() if _same(aval, other)), None)
        if partner is not None:
            del back[partner]
        lanes.append(_Lane(aval, (index, partner)))
    return [*lanes, *(_Lane(aval, (None, index)) for index, aval in back.items())]


def _same(a: Aval, b: Aval) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)
