"""What a plan is searched for: costs of layers, devices and microbatches, as arrays.

Sums over the layers of a stage are differences of running sums, so that the tables of a candidate
are made without a loop over layers.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np

from jaxptis.cluster import Cluster
from jaxptis.performance.costs import Costs, LayerCost

F, B, I, W, AGAIN = range(5)  # noqa: E741
"""Columns of seconds; AGAIN is what B or I takes more in a stage that recomputes all."""
SAVED, KEPT, LASTING = range(3)
"""Columns of bytes: from F to its backward, from I to W, for the whole step."""

_KINDS = "forward", "backward", "input_grad", "weight_grad"
_SECONDS = *(f"{kind}_s" for kind in _KINDS), "recompute_s"
_NEEDS = [f"{kind}_temporary_bytes" for kind in _KINDS]
_HOLDS = "backward_held_bytes", "input_grad_held_bytes", "made_bytes"


class Problem(NamedTuple):
    """L layers on P devices.

    Attributes:
        seconds: [L + 1, 5] running sums, of the columns F, B, I, W and AGAIN.
        held: [L + 1, 3] running sums of bytes, of the columns SAVED, KEPT and LASTING. A layer
            saves its input, too.
        crossing_bytes: [L] what comes to a stage that begins with it.
        needs: [L, 4] bytes that F, B, I and W of each layer need while they run.
        holds: [L, 3] bytes that B, and I, of several layers hold of each to their end, and what I
            makes of each while what was saved is still there.
        tied: [N, K] the layers of each set of tied parameters, then -1. Each counts its set among
            what it holds: what is shared on a device must be taken off, see `make_stages`.
        tied_bytes: [N] of each set.
        start_s: seconds that every task takes beside its layers.
        speed: [P] of devices; 0.5 takes twice as long.
        memory: [P] bytes; infinite if nothing limits them.
        latency_s: [P, P] of links, by source and target; none within a device.
        byte_s: [P, P] seconds that a byte takes.
        num_microbatches: of the step.
        trains_first: whether the first layer makes an input gradient.
        blocking: whether transfers hold up both of their devices.
    """

    seconds: np.ndarray
    held: np.ndarray
    crossing_bytes: np.ndarray
    needs: np.ndarray
    holds: np.ndarray
    tied: np.ndarray
    tied_bytes: np.ndarray
    start_s: float
    speed: np.ndarray
    memory: np.ndarray
    latency_s: np.ndarray
    byte_s: np.ndarray
    num_microbatches: int
    trains_first: bool
    blocking: bool

    @classmethod
    def of(
        cls, costs: Costs, cluster: Cluster, num_microbatches: int, *, blocking: bool = False
    ) -> Self:
        """Return the arrays."""
        devices = range(len(cluster.devices))
        links = [[cluster.link_between(source, target) for target in devices] for source in devices]
        between = 1 - np.eye(len(cluster.devices))
        lasting = {layer.name: _lasting(layer) for layer in costs.layers}
        index = {layer.name: number for number, layer in enumerate(costs.layers)}
        tied = np.full((len(costs.tied), len(costs.layers)), -1)
        tied_bytes = np.array([float(x.param_bytes + x.grad_bytes) for x in costs.tied])
        for number, each in enumerate(costs.tied):
            tied[number, : len(each.layers)] = [index[name] for name in each.layers]
            for name in each.layers:
                lasting[name] += each.param_bytes + each.grad_bytes
            lasting[each.layers[0]] += each.state_bytes
        return cls(
            seconds=_running([[getattr(x, name) for name in _SECONDS] for x in costs.layers]),
            held=_running(
                [
                    [x.saved_bytes + x.input_bytes, x.kept_bytes, lasting[x.name]]
                    for x in costs.layers
                ]
            ),
            crossing_bytes=_column(costs, lambda x: x.crossing_bytes),
            needs=np.array([[getattr(x, name) for name in _NEEDS] for x in costs.layers], float),
            holds=np.array([[getattr(x, name) for name in _HOLDS] for x in costs.layers], float),
            tied=tied,
            tied_bytes=tied_bytes,
            start_s=costs.start_s,
            speed=np.array([device.speed for device in cluster.devices]),
            memory=np.array([float(x.memory_bytes or np.inf) for x in cluster.devices]),
            latency_s=between * np.array([[link.latency_s for link in row] for row in links]),
            byte_s=between * np.array([[1 / link.bytes_per_s for link in row] for row in links]),
            num_microbatches=num_microbatches,
            trains_first=costs.makes_input_grad(range(1)),
            blocking=blocking,
        )

    @property
    def num_layers(self) -> int:
        return len(self.crossing_bytes)

    @property
    def num_devices(self) -> int:
        return len(self.speed)


def _running(rows: list[list[float]]) -> np.ndarray:
    return np.concatenate([np.zeros((1, len(rows[0]))), np.cumsum(np.array(rows, float), axis=0)])


def _column(costs: Costs, number: Callable[[LayerCost], int]) -> np.ndarray:
    return np.array([float(number(layer)) for layer in costs.layers])


def _lasting(layer: LayerCost) -> int:
    return layer.param_bytes + layer.grad_bytes + layer.state_bytes
