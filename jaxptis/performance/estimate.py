"""From the work of layers to their costs."""

from collections.abc import Sequence

from jaxptis.cluster import DeviceSpec
from jaxptis.performance.costs import Costs, LayerCost, roofline_s
from passes.work import LayerWork, Work


def estimate(layers: Sequence[LayerWork], device: DeviceSpec) -> Costs:
    """Return the seconds that each layer takes at least on a device, by its roofline."""

    def seconds(work: Work) -> float:
        return roofline_s(work.flops, work.bytes_accessed, device)

    return Costs(
        tuple(
            LayerCost(
                name=layer.name,
                forward_s=seconds(layer.forward),
                backward_s=seconds(layer.backward),
                # Until the work of the split is counted: half and half.
                input_grad_s=seconds(layer.backward) / 2,
                weight_grad_s=seconds(layer.backward) / 2,
            )
            for layer in layers
        )
    )
