"""Estimates or measures what the layers of a model cost, those of one kind once.

python -m experiments.measure_layers --model=deepseek --size=V3 --device="NVIDIA H200"
python -m experiments.measure_layers --size=7B --source=measured --json_output=llama2-7B.json
python -m experiments.measure_layers --size=7B --head_slices=1,2,4 --json_output=llama2-7B.json

Estimates are of a device that is named, or of the one that is here; they allocate nothing.
Measured is the device that is here, on which the arrays of one kind of layer are at a time. The
file is one that `jaxptis.pipeline(costs=...)` takes. Each number of slices of the head has its own,
with the same costs of the layers before; that of two slices is named llama2-7B-2-slices.json.
"""

import dataclasses
import functools
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.chosen_costs import DEVICE, OPTIMIZER, device_spec, make_optimizer
from experiments.chosen_model import MODEL, SIZE
from experiments.json_output import JSON_OUTPUT
from experiments.model_layers import layers_of
from experiments.refused import refused_plainly
from experiments.sliced_costs import with_slices
from experiments.wide_console import wide_console
from jaxptis.performance.costs import Costs, LayerCost, TiedParams
from jaxptis.performance.estimate import estimate
from jaxptis.performance.measure import measure_kinds, measured_costs
from jaxptis.performance.optimizer_state import optimizer_state_bytes
from models import MODELS
from passes.layer_programs import layer_programs, number_together

SECONDS = {
    "F": "forward_s",
    "B": "backward_s",
    "I": "input_grad_s",
    "W": "weight_grad_s",
    "recompute": "recompute_s",
}
BYTES = {
    "param": "param_bytes",
    "state": "state_bytes",
    "input": "input_bytes",
    "skipping": "skipping_bytes",
    "saved": "saved_bytes",
    "saved all": "saved_all_bytes",
    "kept": "kept_bytes",
    "F temp": "forward_temporary_bytes",
    "B temp": "backward_temporary_bytes",
    "I temp": "input_grad_temporary_bytes",
    "W temp": "weight_grad_temporary_bytes",
}
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}

for flag in (MODEL, SIZE, DEVICE, OPTIMIZER, JSON_OUTPUT):
    flags.declare_key_flag(flag.name)  # which --help lists
SEQ_LEN = flags.DEFINE_integer("seq_len", 4096, "Tokens predicted in each sequence.", lower_bound=1)
MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 1, "Sequences in a microbatch.", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float16", "float32"],
    "What the model computes in; by default its own. Parameters keep theirs.",
)
SOURCE = flags.DEFINE_enum(
    "source", "estimated", ["estimated", "measured"], "Where the costs are from."
)
HEAD_SLICES = flags.DEFINE_list(
    "head_slices", ["1"], "Into how many slices the head is cut, each beside the others."
)

SETTINGS = (MODEL, SIZE, SEQ_LEN, MICROBATCH_SIZE, OPTIMIZER)


@flags.multi_flags_validator(
    ["source", "device"], "what is measured is the device that is here; drop --device"
)
def _is_here(values: dict[str, Any]) -> bool:
    return values["source"] == "estimated" or values["device"] is None


@flags.validator("head_slices", "write counts of 1 or more, each once, as in 1,2,4")
def _are_counts(texts: list[str]) -> bool:
    are_counts = all(text.isdecimal() and int(text) for text in texts)
    return bool(texts) and are_counts and len(set(texts)) == len(texts)


def main(argv: list[str]) -> None:
    """Prints a line a kind of layer, and writes all costs to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    console = wide_console()
    with refused_plainly():
        found = find_costs(console)
    for costs, ratios in found:
        report(costs, console)
        if ratios:
            report_ratios(ratios, console)
        if JSON_OUTPUT.value is not None:
            path = pathlib.Path(JSON_OUTPUT.value)
            costs.save(with_slices(path, costs.settings["head_slices"]))


def find_costs(console: Console) -> list[tuple[Costs, dict[str, dict[str, float]]]]:
    """Returns the costs of each of --head_slices.

    If they are measured, with estimated over measured by kind and program. A kind is measured once
    for all where `number_together` sees that it is one; of Mamba and experts on a GPU, twice.
    """
    model = MODELS[MODEL.value]
    config = model.sizes[SIZE.value]
    if DTYPE.value is not None:
        config = dataclasses.replace(config, dtype=jax.numpy.dtype(DTYPE.value))
    dtype, counts = jax.numpy.dtype(config.dtype), list(map(int, HEAD_SLICES.value))
    found, states_bytes = [], []
    with console.status("finding layers"):
        for count in counts:
            graph, params = layers_of(
                model,
                config,
                microbatch_size=MICROBATCH_SIZE.value,
                sequence_length=SEQ_LEN.value,
                head_slices=count,
            )
            found.append(layer_programs(graph))
            states_bytes.append(optimizer_state_bytes(graph.program, params, make_optimizer(model)))
    models = number_together(found)
    bar = functools.partial(track, console=console, transient=True)
    device = device_spec(dtype)
    estimating = functools.partial(bar, description="estimating")
    estimated = [
        estimate(layers, device, state_bytes=state_bytes, track=estimating)
        for layers, state_bytes in zip(models, states_bytes, strict=True)
    ]
    settings = {flag.name: flag.value for flag in SETTINGS} | {
        "dtype": dtype.name,
        "command": f"python -m experiments.measure_layers {shlex.join(sys.argv[1:])}",
    }
    if SOURCE.value == "estimated":
        return [
            (dataclasses.replace(costs, settings={**settings, "head_slices": count}), {})
            for count, costs in zip(counts, estimated, strict=True)
        ]
    here = jax.devices()[0]
    measuring = functools.partial(bar, description="measuring")
    kinds, start_s = measure_kinds([x for each in models for x in each], here, track=measuring)
    pairs = []
    for count, known, layers, state_bytes in zip(
        counts, estimated, models, states_bytes, strict=True
    ):
        measured = measured_costs(layers, kinds, start_s, here, state_bytes)
        ratios = compare(known, measured)
        of_count = {"head_slices": count, **measured.settings, "estimated_over_measured": ratios}
        pairs.append((dataclasses.replace(measured, settings=settings | of_count), ratios))
    return pairs


def compare(estimated: Costs, measured: Costs) -> dict[str, dict[str, float]]:
    """Returns estimated over measured seconds, by kind of layer and program; none of nothing."""
    found = {layer.name: layer for layer in estimated.layers}
    return {
        kind: {
            program: getattr(found[layers[0].name], name) / getattr(layers[0], name)
            for program, name in SECONDS.items()
            if getattr(layers[0], name)
        }
        for kind, layers in measured.kinds.items()
    }


def report(costs: Costs, console: Console) -> None:
    """Prints the times, then the bytes, of each kind of layer."""
    count = costs.settings["head_slices"]
    slices = f", the head in {count} slices" if count > 1 else ""
    console.print(
        f"{len(costs.layers)} layers of {len(costs.kinds)} kinds{slices}, {costs.source} for "
        f"{costs.device}; {costs.start_s * 1e6:.1f} us to start a task",
        soft_wrap=True,
    )
    for table in times_of(costs), sizes_of(costs):
        console.print()
        console.print(table)


def times_of(costs: Costs) -> Table:
    """Returns the milliseconds of each kind of layer, and of all layers."""
    table = new_table("ms", "layers", *SECONDS, "spread")
    for kind, layers in costs.kinds.items():
        cells = (f"{getattr(layers[0], name) * 1e3:.3f}" for name in SECONDS.values())
        table.add_row(kind, str(len(layers)), *cells, f"{layers[0].spread:.0%}")
    total = (sum(getattr(layer, name) for layer in costs.layers) for name in SECONDS.values())
    table.add_row("all", str(len(costs.layers)), *(f"{seconds * 1e3:.3f}" for seconds in total))
    return table


def sizes_of(costs: Costs) -> Table:
    """Returns the bytes of each kind of layer, and of what layers share."""
    rows: dict[str, LayerCost | TiedParams]
    rows = {kind: layers[0] for kind, layers in costs.kinds.items()}
    rows |= {f"shared by {' '.join(each.layers)}": each for each in costs.tied}
    sizes = {row: [getattr(cost, name, 0) for name in BYTES.values()] for row, cost in rows.items()}
    largest = max(max(row) for row in sizes.values())
    unit = next((unit for unit, size in UNITS.items() if largest > 10 * size), "kB")
    table = new_table(unit, *BYTES)
    for name, row in sizes.items():
        table.add_row(name, *(f"{num_bytes / UNITS[unit]:,.1f}" for num_bytes in row))
    return table


def new_table(*columns: str) -> Table:
    """Returns a table in which numbers are whole, however narrow it is."""
    table = Table(box=None)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def report_ratios(ratios: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Prints estimated over measured seconds of each kind of layer."""
    table = new_table("estimated over measured", *SECONDS)
    for kind, each in ratios.items():
        cells = (f"{each[program]:.2f}" if program in each else "" for program in SECONDS)
        table.add_row(kind, *cells)
    console.print()
    console.print(table)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
