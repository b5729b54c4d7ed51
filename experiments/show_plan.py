"""Shows a plan and its predicted timeline; no device is needed, and nothing is allocated.

python -m experiments.show_plan --model=deepseek --size=V3  # its layers
python -m experiments.show_plan --size=7B --device="NVIDIA H200" --strategy=zb-v
python -m experiments.show_plan --costs=costs.json --strategy=plan.txt --html_output=step.html

The layers are those of a model, of any size, whose costs are estimated; or those of a file that
experiments.measure_layers, `trainer.costs.save` or a person has written. The step is simulated as
the executor runs it: a device takes part in its transfers, and both ends wait until one is over.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from experiments.chosen_costs import DEVICE, OPTIMIZER, device_spec, make_optimizer
from experiments.chosen_model import MODEL, SIZE
from experiments.model_layers import layers_of
from experiments.predicted_step import PredictedStep, report, to_json
from experiments.refused import refused_plainly
from jaxptis.cluster import DEVICE_SPECS, Cluster, DeviceSpec, Link
from jaxptis.make_plan import make_plan
from jaxptis.performance import Costs, simulate
from jaxptis.performance.check_memory import check_memory
from jaxptis.performance.estimate import estimate
from jaxptis.performance.optimizer_state import optimizer_state_bytes
from jaxptis.pictures.bottleneck import find_bottleneck
from jaxptis.pictures.words import duration, size
from models import MODELS
from passes import jaxprs
from passes.layer_programs import layer_programs
from passes.layers import LayerGraph

NO_LIMIT = DEVICE_SPECS["cpu"]  # of memory: nothing is known of it
FILE_WIDTH = 120  # characters of what is not printed to a terminal

COSTS = flags.DEFINE_string(
    "costs", None, "A file of costs, in JSON, in place of a model and what it is estimated for."
)
MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 1, "Sequences in a microbatch.", lower_bound=1
)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 4096, "Tokens predicted in each sequence.", lower_bound=1
)
STRATEGY = flags.DEFINE_string(
    "strategy",
    None,
    "A schedule such as 1f1b or zb-v, best to search for one, or the path of a plan file; without "
    "one only the layers are shown.",
)
NUM_DEVICES = flags.DEFINE_integer("num_devices", 4, "Devices in the pipeline.", lower_bound=1)
NUM_MICROBATCHES = flags.DEFINE_integer(
    "num_microbatches", 8, "Parts that each batch is cut into.", lower_bound=1
)
LATENCY_S = flags.DEFINE_float(
    "latency_s", 0.0, "Seconds that a transfer takes beside its bytes.", lower_bound=0.0
)
BYTES_PER_S = flags.DEFINE_float(
    "bytes_per_s",
    None,
    "Of a link between two devices, each way; by default a transfer takes no time for them.",
    lower_bound=1.0,
)
JSON_OUTPUT = flags.DEFINE_string("json_output", None, "File for all figures.")
HTML_OUTPUT = flags.DEFINE_string("html_output", None, "File for a page that shows the step.")

Json = dict[str, Any]

OF_MODEL = (MODEL, SIZE, MICROBATCH_SIZE, SEQUENCE_LENGTH, DEVICE, OPTIMIZER)
OF_STEP = (STRATEGY, NUM_DEVICES, NUM_MICROBATCHES, LATENCY_S, BYTES_PER_S)
FOR_A_PLAN = (*OF_STEP, DEVICE, OPTIMIZER, HTML_OUTPUT)


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


@flags.multi_flags_validator(
    [flag.name for flag in FOR_A_PLAN],
    "without --strategy only layers are shown; add it, or drop "
    + ", ".join(f"--{flag.name}" for flag in FOR_A_PLAN[1:]),
)
def _has_plan(values: Json) -> bool:
    return values["strategy"] is not None or not any(flag.present for flag in FOR_A_PLAN)


@flags.validator("json_output", "its folder does not exist; create it first")
@flags.validator("html_output", "its folder does not exist; create it first")
def _has_folder(path: str | None) -> bool:
    return path is None or pathlib.Path(path).absolute().parent.is_dir()


@flags.validator("html_output", "it is a page for a browser; let it end in .html")
def _is_page(path: str | None) -> bool:
    return path is None or path.endswith(".html")


def main(argv: list[str]) -> None:
    """Prints the layers, then the plan and what is predicted, and writes the files."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    path, refusal = COSTS.value, None
    layers, costs, device = of_model(console) if path is None else of_file(path, console)
    figures: Json = {"settings": settings(), "layers": layers}
    if costs is not None and STRATEGY.value is not None:
        step = predict(costs, STRATEGY.value, device)
        report(step, console)
        refusal = why_it_does_not_fit(step)
        figures |= {**to_json(step), "refusal": refusal}
        if HTML_OUTPUT.value is not None:
            step.timeline.save(HTML_OUTPUT.value, plan=step.plan, title=title())
    if JSON_OUTPUT.value is not None:
        pathlib.Path(JSON_OUTPUT.value).write_text(json.dumps(figures, indent=1) + "\n")
    if refusal is not None:
        sys.exit(refusal)


def of_model(console: Console) -> tuple[list[Json], Costs | None, DeviceSpec]:
    """Prints the layers of a model; returns them, and if they are planned what they cost."""
    model = MODELS[MODEL.value]
    config = model.sizes[SIZE.value]
    graph, params = layers_of(
        model,
        config,
        microbatch_size=MICROBATCH_SIZE.value,
        sequence_length=SEQUENCE_LENGTH.value,
    )
    layers = print_layers(graph, console)
    if STRATEGY.value is None:
        return layers, None, NO_LIMIT
    device = device_spec(jax.numpy.dtype(config.dtype))
    costs = estimate(
        layer_programs(graph),
        device,
        state_bytes=optimizer_state_bytes(graph.program, params, make_optimizer(model)),
        track=functools.partial(track, console=console, transient=True, description="estimating"),
    )
    return layers, costs, device


def print_layers(graph: LayerGraph, console: Console) -> list[Json]:
    """Prints the number of layers and of parameters, and both of each layer."""
    sizes = [math.prod(jaxprs.shape_of(v)) for v in graph.program.param_vars]
    table = Table("layer", "name", "parameters", box=None)
    counts = {layer.name: sum(sizes[p] for p in layer.params) for layer in graph.layers}
    for index, (name, count) in enumerate(counts.items()):
        table.add_row(str(index), Text(name), f"{count:,}")
    console.print(f"{len(counts)} layers, {sum(sizes):,} parameters")
    console.print(table)
    return [{"name": name, "parameters": count} for name, count in counts.items()]


def of_file(path: str, console: Console) -> tuple[list[Json], Costs, DeviceSpec]:
    """Prints the layers of a file; returns them, what they cost, and the device."""
    with refused_plainly():
        costs = Costs.load(path)
    table = Table("layer", "name", "forward", "backward", "parameters", box=None)
    for index, layer in enumerate(costs.layers):
        seconds = duration(layer.forward_s), duration(layer.backward_s)
        table.add_row(str(index), Text(layer.name), *seconds, size(layer.param_bytes))
    of = f", {costs.source} for {costs.device}" if costs.device else f", {costs.source}"
    console.print(Text(f"{len(costs.layers)} layers{of}"))
    console.print(table)
    layers = [dataclasses.asdict(layer) for layer in costs.layers]
    return layers, costs, DEVICE_SPECS.get(costs.device, NO_LIMIT)


def predict(costs: Costs, strategy: str, device: DeviceSpec) -> PredictedStep:
    """Returns the plan of a strategy, and its step on equal devices."""
    with refused_plainly():
        link = Link(latency_s=LATENCY_S.value, bytes_per_s=BYTES_PER_S.value or math.inf)
        cluster = Cluster((device,) * NUM_DEVICES.value, link)
        plan = make_plan(costs, strategy, cluster=cluster, num_microbatches=NUM_MICROBATCHES.value)
        step = PredictedStep(plan, simulate(plan, costs, cluster, blocking=True), cluster)
        find_bottleneck(step.timeline, plan)  # refuses a step that takes no time
    return step


def why_it_does_not_fit(step: PredictedStep) -> str | None:
    """Returns what a device lacks of memory, and what to change; None if all have enough."""
    try:
        check_memory(step.timeline, step.cluster)
    except ValueError as error:
        return str(error)
    return None


def settings() -> Json:
    """Returns the flags that count, by name."""
    given = OF_MODEL if COSTS.value is None else (COSTS,)
    step = OF_STEP if STRATEGY.value is not None else ()
    return {flag.name: flag.value for flag in (*given, *step) if flag.value is not None}


def title() -> str:
    """Returns what the page is called."""
    model = f"{MODEL.value} {SIZE.value}" if COSTS.value is None else pathlib.Path(COSTS.value).name
    return f"{model}, {STRATEGY.value}, predicted"


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
