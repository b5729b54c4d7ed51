"""From the layers of a model, and what the user chose, to their costs."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from os import PathLike
from types import MappingProxyType
from typing import Any

from jaxptis.options import Options
from jaxptis.performance import Costs
from jaxptis.performance.costs_file import from_json, to_json
from jaxptis.performance.estimate import estimate
from jaxptis.performance.measure import measure
from jaxptis.processes import Processes, is_local
from passes.cut_stages import cut_stages
from passes.layer_programs import layer_programs, skipping_bytes
from passes.layers import LayerGraph
from passes.stages import Operand

_MEASURED = (
    *("forward_s", "backward_s", "input_grad_s", "weight_grad_s", "recompute_s"),
    "spread",
)


def choose_costs(
    graph: LayerGraph, options: Options, values: Mapping[Operand, Any] = MappingProxyType({})
) -> Costs:
    """Estimate, measure or read the costs of the layers.

    What skips layers is looked up in the model, also where costs are given.
    Of several processes each measures, all at the same time, and the means are taken.

    Args:
      graph: the layers.
      options: what the user chose.
      values: of all parameters and of a microbatch, for layers to be measured on; may be empty.

    Raises:
      ValueError: the costs cannot be read, or are those of other layers.
    """
    chosen = options.costs
    if chosen == "estimated":
        return estimate(layer_programs(graph), options.cluster.devices[0])
    if chosen == "measured":
        processes = Processes(options.devices)
        processes.begin("measuring the layers")
        device = next(filter(is_local, options.devices))
        own = measure(layer_programs(graph), device, values=values, ready=processes.wait_for_all)
        return _mean(own, processes)
    costs = chosen if isinstance(chosen, Costs) else _load(chosen)
    where = "costs" if isinstance(chosen, Costs) else str(chosen)
    _check_layers(graph.names, costs, where)
    return _with_skipping_bytes(costs, graph)


def _with_skipping_bytes(costs: Costs, graph: LayerGraph) -> Costs:
    """Return costs in which that is as the model has it, whatever is given."""
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    layers = (
        dataclasses.replace(layer, skipping_bytes=skipping_bytes(stages, index))
        for index, layer in enumerate(costs.layers)
    )
    return dataclasses.replace(costs, layers=tuple(layers))


def _mean(own: Costs, processes: Processes) -> Costs:
    """Return the means of what the processes have measured, the same in each of them."""
    every = [from_json(text, source="measured") for text in processes.share(to_json(own))]
    layers = (
        dataclasses.replace(same[0], **{name: _mean_of(name, same) for name in _MEASURED})
        for same in zip(*(costs.layers for costs in every), strict=True)
    )
    return dataclasses.replace(own, layers=tuple(layers), start_s=_mean_of("start_s", every))


def _mean_of(name: str, owners: Sequence[Any]) -> float:
    return statistics.fmean(getattr(owner, name) for owner in owners)


def _load(path: str | PathLike[str]) -> Costs:
    try:
        return Costs.load(path)
    except (OSError, TypeError) as error:
        raise ValueError(
            f'costs {path!r} are neither "estimated" nor "measured" nor the path of a file that '
            f"can be read ({error}); change it, or write the file with costs.save(path)"
        ) from error


def _check_layers(found: Sequence[str], costs: Costs, where: str) -> None:
    given = [cost.name for cost in costs.layers]
    for index, (name, layer) in enumerate(zip_longest(given, found)):
        if name != layer:
            raise ValueError(
                f"{where}: these are costs of another model: layer {index} is {name!r} there, in "
                f"the model {layer!r} ({len(given)} layers there, {len(found)} in the model); give "
                "the costs of the model's layers, in their order"
            )
