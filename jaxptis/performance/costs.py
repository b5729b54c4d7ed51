"""What every layer costs, and what a device needs for given work."""

import math
from dataclasses import dataclass

from jaxptis.cluster import DeviceSpec


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Seconds that a layer takes for one microbatch.

    Attributes:
        name: the layer's.
        forward_s: of a forward, F.
        backward_s: of a whole backward, B: its own figure, since splitting may have a price.
        input_grad_s: of the input gradient of a split backward, I.
        weight_grad_s: of the weight gradient of a split backward, W.

    Raises:
        ValueError: seconds are negative or not finite.
    """

    name: str
    forward_s: float
    backward_s: float
    input_grad_s: float
    weight_grad_s: float

    def __post_init__(self) -> None:
        for what in "forward_s", "backward_s", "input_grad_s", "weight_grad_s":
            seconds = getattr(self, what)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(
                    f"{what} of layer {self.name!r} is {seconds}; use finite seconds of 0 or more"
                )


@dataclass(frozen=True)
class Costs:
    """The costs of all layers in the order of the model."""

    layers: tuple[LayerCost, ...]

    def task_s(self, stage_layers: range, kind: str) -> float:
        """Return the seconds of one task of a stage that holds the layers of these indices.

        Raises:
            ValueError: `kind` is not F, B, I or W.
        """
        layers = (self.layers[index] for index in stage_layers)
        match kind:
            case "F":
                return sum(layer.forward_s for layer in layers)
            case "B":
                return sum(layer.backward_s for layer in layers)
            case "I":
                return sum(layer.input_grad_s for layer in layers)
            case "W":
                return sum(layer.weight_grad_s for layer in layers)
        raise ValueError(f"task kind {kind!r} is not known; use one of F, B, I, W")


def roofline_s(flops: float, bytes_accessed: float, device: DeviceSpec) -> float:
    """Return the seconds that work takes at least: to compute it, or to move its bytes.

    The roofline model of Williams, Waterman and Patterson (Communications of the ACM 52(4), 2009).
    """
    return max(flops / device.flops_per_s, bytes_accessed / device.bytes_per_s)
