"""From the layers of a model, and what the user chose, to their costs."""

from collections.abc import Sequence
from itertools import zip_longest
from os import PathLike

import jax

from jaxptis.options import Options
from jaxptis.performance import Costs
from jaxptis.performance.estimate import estimate
from jaxptis.performance.measure import measure
from passes.layer_programs import layer_programs
from passes.layers import LayerGraph


def choose_costs(graph: LayerGraph, options: Options) -> Costs:
    """Estimate, measure or read the costs of the layers.

    Raises:
      ValueError: the costs cannot be read, are those of other layers, or cannot be measured.
    """
    chosen = options.costs
    if chosen == "estimated":
        return estimate(layer_programs(graph), options.cluster.devices[0])
    if chosen == "measured":
        if jax.process_count() > 1:
            raise ValueError(
                f"each of {jax.process_count()} processes would measure other costs, and make "
                "another plan; measure in one process, save what it found (pipelined.costs.save), "
                "and pass the path of the file as costs"
            )
        return measure(layer_programs(graph), options.devices[0])
    costs = chosen if isinstance(chosen, Costs) else _load(chosen)
    where = "costs" if isinstance(chosen, Costs) else str(chosen)
    _check_layers([layer.name for layer in graph.layers], costs, where)
    return costs


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
