"""The flags that say which layers are planned: those of a file of costs, or of a model."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from experiments.chosen_costs import DEVICE, OPTIMIZER, device_spec, make_optimizer
from experiments.chosen_model import MODEL, SIZE
from experiments.model_layers import layers_of
from experiments.refused import refused_plainly
from jaxptis.cluster import DEVICE_SPECS, DeviceSpec
from jaxptis.performance import Costs
from jaxptis.performance.estimate import estimate
from jaxptis.performance.optimizer_state import optimizer_state_bytes
from jaxptis.pictures.words import duration, size
from models import MODELS
from passes import jaxprs
from passes.layer_programs import layer_programs
from passes.layers import LayerGraph

NO_LIMIT = DEVICE_SPECS["cpu"]  # of memory: nothing is known of it

COSTS = flags.DEFINE_string(
    "costs", None, "A file of costs, in JSON, in place of a model and what it is estimated for."
)
MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 1, "Sequences in a microbatch.", lower_bound=1
)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 4096, "Tokens predicted in each sequence.", lower_bound=1
)

OF_MODEL = (MODEL, SIZE, MICROBATCH_SIZE, SEQUENCE_LENGTH, DEVICE, OPTIMIZER)

Json = dict[str, Any]


@flags.validator("costs", "there is no such file; write one with experiments.measure_layers")
def _is_there(path: str | None) -> bool:
    return path is None or pathlib.Path(path).is_file()


@flags.multi_flags_validator(
    ["costs", *(flag.name for flag in OF_MODEL)],
    "the file of --costs says what is planned; drop "
    + ", ".join(f"--{flag.name}" for flag in OF_MODEL),
)
def _says_it_once(values: Json) -> bool:
    return values["costs"] is None or not any(flag.present for flag in OF_MODEL)


@dataclasses.dataclass(frozen=True)
class ChosenLayers:
    """What is planned.

    Attributes:
        layers: figures of each, for a file.
        costs: of each; None if nobody wants them.
        device: that they are for.
    """

    layers: list[Json]
    costs: Costs | None
    device: DeviceSpec


def chosen_layers(console: Console, *, with_costs: bool) -> ChosenLayers:
    """Prints the layers, and returns them; those of a file always with their costs."""
    return _of_model(console, with_costs) if COSTS.value is None else _of_file(COSTS.value, console)


def layers_title() -> str:
    """Returns the name of the model, or of the file."""
    return f"{MODEL.value} {SIZE.value}" if COSTS.value is None else pathlib.Path(COSTS.value).name


def layers_settings() -> tuple[flags.FlagHolder[Any], ...]:
    """Returns the flags that count."""
    return OF_MODEL if COSTS.value is None else (COSTS,)


def _of_model(console: Console, with_costs: bool) -> ChosenLayers:
    model = MODELS[MODEL.value]
    config = model.sizes[SIZE.value]
    graph, params = layers_of(
        model,
        config,
        microbatch_size=MICROBATCH_SIZE.value,
        sequence_length=SEQUENCE_LENGTH.value,
    )
    layers = _print_layers(graph, console)
    if not with_costs:
        return ChosenLayers(layers, None, NO_LIMIT)
    device = device_spec(jax.numpy.dtype(config.dtype))
    costs = estimate(
        layer_programs(graph),
        device,
        state_bytes=optimizer_state_bytes(graph.program, params, make_optimizer(model)),
        track=functools.partial(track, console=console, transient=True, description="estimating"),
    )
    return ChosenLayers(layers, costs, device)


def _print_layers(graph: LayerGraph, console: Console) -> list[Json]:
    """Prints the number of layers and of parameters, and both of each layer."""
    sizes = [math.prod(jaxprs.shape_of(v)) for v in graph.program.param_vars]
    table = Table("layer", "name", "parameters", box=None)
    counts = {layer.name: sum(sizes[p] for p in layer.params) for layer in graph.layers}
    for index, (name, count) in enumerate(counts.items()):
        table.add_row(str(index), Text(name), f"{count:,}")
    console.print(f"{len(counts)} layers, {sum(sizes):,} parameters")
    console.print(table)
    return [{"name": name, "parameters": count} for name, count in counts.items()]


def _of_file(path: str, console: Console) -> ChosenLayers:
    with refused_plainly():
        costs = Costs.load(path)
    table = Table("layer", "name", "forward", "backward", "parameters", box=None)
    for index, layer in enumerate(costs.layers):
        seconds = duration(layer.forward_s), duration(layer.backward_s)
        table.add_row(str(index), Text(layer.name), *seconds, size(layer.param_bytes))
    of = f", {costs.source} for {costs.device}" if costs.device else f", {costs.source}"
    console.print(Text(f"{len(costs.layers)} layers{of}"))
    console.print(table)
    if costs.device not in DEVICE_SPECS:
        console.print(
            Text("Nothing is known of the device, so its memory has no limit: --memory_limit_gib")
        )
    layers = [dataclasses.asdict(layer) for layer in costs.layers]
    return ChosenLayers(layers, costs, DEVICE_SPECS.get(costs.device, NO_LIMIT))
