"""What a layer takes at least, in every plan: what the bounds of a step are made of.

A plan may run a backward whole (B) or split (I, W), and may recompute: of each choice the cheapest
counts. Cut down to layers, the tasks of a microbatch are a chain: forwards from the first layer to
the last, then input gradients back to the first. A whole backward is its layers' backwards, one
after the other. Transfers, recomputation and what tasks take to start only add time.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from jaxptis.performance.costs import Costs, LayerCost


@dataclass(frozen=True)
class LeastLayer:
    """A layer, for one microbatch, on a device of speed 1.

    Attributes:
        forward_s: of its forward.
        path_s: of its backward, until the layer before can go on.
        backward_s: of its whole backward, or of I and W.
        lasting_bytes: that its device holds for the whole step, tied parameters not counted.
        passing_bytes: beside these, while its backward runs.
        tied: the indices of the tied parameters that it reads.
    """

    forward_s: float
    path_s: float
    backward_s: float
    lasting_bytes: int
    passing_bytes: int
    tied: frozenset[int]

    @property
    def work_s(self) -> float:
        """Seconds of its device."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Least:
    """All layers, and the seconds before and after each in the chain of a microbatch.

    Attributes:
        layers: in the order of the model.
        tied_bytes: of each set of tied parameters, on every device that reads them.
        start_s: of every task, beside its layers.
    """

    layers: tuple[LeastLayer, ...]
    tied_bytes: tuple[int, ...]
    start_s: float

    @classmethod
    def of(cls, costs: Costs) -> "Least":
        """Return what the layers of these costs take at least."""
        layers = costs.layers
        after = [*(layer.input_bytes for layer in layers[1:]), 0]
        state = {tied.layers[0]: 0 for tied in costs.tied}
        for tied in costs.tied:
            state[tied.layers[0]] += tied.state_bytes
        return cls(
            tuple(
                _least(
                    layer,
                    splits=costs.makes_input_grad(range(index, index + 1)),
                    read_bytes=layer.input_bytes if index else 0,
                    made_bytes=after[index],
                    state_bytes=layer.state_bytes + state.get(layer.name, 0),
                    tied=frozenset(
                        number
                        for number, tied in enumerate(costs.tied)
                        if layer.name in tied.layers
                    ),
                )
                for index, layer in enumerate(layers)
            ),
            tuple(tied.param_bytes + tied.grad_bytes for tied in costs.tied),
            costs.start_s,
        )

    @cached_property
    def before_s(self) -> np.ndarray:
        """[L + 1] seconds from the start of a microbatch until its forward of a layer can begin."""
        return np.array([*accumulate((x.forward_s for x in self.layers), initial=0.0)])

    @cached_property
    def after_s(self) -> np.ndarray:
        """[L + 1] seconds that a microbatch takes after its input gradient of a layer."""
        return np.array([*accumulate((x.path_s for x in self.layers), initial=0.0)])

    @property
    def work_s(self) -> float:
        """Seconds of devices that a microbatch takes."""
        return sum(layer.work_s for layer in self.layers)


def _least(
    layer: LayerCost,
    *,
    splits: bool,
    read_bytes: int,
    made_bytes: int,
    state_bytes: int,
    tied: frozenset[int],
) -> LeastLayer:
    """Return a layer that reads and makes these bytes.

    While its backward runs, its device holds what it reads, what it saved (or has just computed
    again), the gradient of what it made (or, inside of a stage, what it made) and the
    temporaries of a whole backward or of an input gradient.
    """
    saved_bytes = min(layer.saved_bytes, layer.saved_all_bytes)  # a stage recomputes all, or none
    temporary_bytes = min(layer.backward_temporary_bytes, layer.input_grad_temporary_bytes)
    whole_s, split_s = layer.backward_s, layer.input_grad_s + layer.weight_grad_s
    return LeastLayer(
        forward_s=layer.forward_s,
        path_s=min(whole_s, layer.input_grad_s) if splits else whole_s,
        backward_s=min(whole_s, split_s) if splits else whole_s,
        lasting_bytes=layer.param_bytes + layer.grad_bytes + state_bytes,
        passing_bytes=read_bytes + saved_bytes + made_bytes + temporary_bytes,
        tied=tied,
    )
