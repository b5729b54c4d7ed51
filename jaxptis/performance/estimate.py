"""Costs from what XLA counts in the programs of layers, through the roofline of a device.

XLA counts in what it compiles for the backend at hand. A CPU computes 16-bit floats in 32 bits and
attention in full, so what is counted there moves more bytes than a GPU would.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jaxptis.cluster import DeviceSpec
from jaxptis.performance.costs import Costs, roofline_s
from jaxptis.performance.layer_costs import KindCost, Track, kinds_of, layer_costs, tied_params
from passes.layer_programs import LayerPrograms
from passes.work import LayerWork, Work, count_work


def estimate(
    layers: Sequence[LayerPrograms],
    device: DeviceSpec,
    *,
    state_bytes: Mapping[int, int] = MappingProxyType({}),
    track: Track = iter,
) -> Costs:
    """Return what each layer takes at least on a device.

    Args:
        layers: what they run.
        device: what it can do.
        state_bytes: the optimizer's state of each parameter.
        track: goes through the kinds of layers.
    """
    costs = {kind.index: _kind_cost(count_work(kind), device) for kind in track(kinds_of(layers))}
    return Costs(
        layer_costs(layers, costs, state_bytes),
        tied=tied_params(layers, state_bytes),
        start_s=device.start_s,
        source="estimated",
        device=device.kind,
    )


def _kind_cost(work: LayerWork, device: DeviceSpec) -> KindCost:
    programs: dict[str, Work] = {
        "F": work.forward,
        "B": work.backward,
        "I": work.input_grad,
        "W": work.weight_grad,
        "again": work.again,
    }
    return KindCost(
        seconds={
            name: roofline_s(each.flops, each.bytes_accessed, device)
            for name, each in programs.items()
        },
        temporary_bytes={name: each.temporary_bytes for name, each in programs.items()},
    )
