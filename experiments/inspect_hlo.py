"""Shows what XLA makes of the stages of a pipeline; nothing of the model is allocated.

python -m experiments.inspect_hlo --model=llama2 --size=tiny --strategy=zb-v
python -m experiments.inspect_hlo --size=7B --stage=1 --kind=F --output_dir=hlo

Of each stage and kind of task (F forward, B backward, I and W its two parts): what XLA counts, in
which a loop counts once, the memory that it needs, collectives, and the ops that take the most time
by the roofline of the device (nominal on a CPU: there only shares mean something).
experiments/hlo_ops.py says how the work of an op is estimated.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import jaxptis
from experiments.chosen_model import MODEL, SIZE
from experiments.chosen_pipeline import NUM_DEVICES, NUM_MICROBATCHES
from experiments.hlo_page import save_page
from experiments.json_output import JSON_OUTPUT, has_folder, write_json
from experiments.model_layers import loss_of
from experiments.refused import refused_plainly
from experiments.stage_hlo import Inspected, count, inspect, name_collectives, to_json
from experiments.wide_console import wide_console
from jaxptis.call import CompiledStage
from jaxptis.cluster import DEVICE_SPECS, DeviceSpec, kind_of
from jaxptis.executor.stage_tasks import KINDS
from jaxptis.pictures.words import duration, layer_names, percent, size
from models import MODELS

for flag in (MODEL, SIZE, NUM_DEVICES, NUM_MICROBATCHES, JSON_OUTPUT):
    flags.declare_key_flag(flag.name)  # which --help lists
STRATEGY = flags.DEFINE_string(
    "strategy", "1f1b", "A schedule such as 1f1b or zb-v, or the path of a plan file."
)
MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 1, "Sequences in a microbatch.", lower_bound=1
)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 128, "Tokens predicted in each sequence.", lower_bound=1
)
STAGE = flags.DEFINE_multi_integer(
    "stage", None, "Only this stage; may be given several times.", lower_bound=0
)
KIND = flags.DEFINE_multi_enum(
    "kind", None, list(KINDS), "Only this kind of task; may be given several times."
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for the StableHLO and the optimized HLO of each program."
)
HTML_OUTPUT = flags.DEFINE_string("html_output", None, "File for a page with figures and HLO.")

SETTINGS = (
    *(MODEL, SIZE, NUM_DEVICES, NUM_MICROBATCHES, STRATEGY),
    *(MICROBATCH_SIZE, SEQUENCE_LENGTH, STAGE, KIND),
)


flags.register_validator("html_output", has_folder, "its folder does not exist; create it first")
flags.register_validator(
    "output_dir", has_folder, "the folder around it does not exist; create that first"
)


@flags.validator("html_output", "it is a page for a browser; let it end in .html")
def _is_page(path: str | None) -> bool:
    return path is None or path.endswith(".html")


def main(argv: list[str]) -> None:
    """Compiles, prints the figures, and writes the files."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    console = wide_console()
    devices = find_devices()
    with console.status("finding layers and planning"), refused_plainly():
        stages = lower(devices)
    found = compile_chosen(stages, DEVICE_SPECS[kind_of(devices[0])], console)
    report(found, console)
    if OUTPUT_DIR.value is not None:
        write_texts(found, pathlib.Path(OUTPUT_DIR.value))
    if HTML_OUTPUT.value is not None:
        title = f"{MODEL.value} {SIZE.value}, {STRATEGY.value}, programs of the stages"
        save_page(HTML_OUTPUT.value, found, title=title)
    write_json(
        {
            "settings": {flag.name: flag.value for flag in SETTINGS},
            "jax": jax.__version__,
            "device": devices[0].device_kind,
            "programs": [to_json(each) for each in found],
        }
    )


def find_devices() -> list[Any]:
    """Returns as many devices as the pipeline has; on the CPU backend they are made."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES.value)
    devices = jax.devices()[: NUM_DEVICES.value]
    if len(devices) < NUM_DEVICES.value:
        sys.exit(f"--num_devices={NUM_DEVICES.value}, but JAX sees {len(devices)}; lower it")
    return devices


def lower(devices: Sequence[Any]) -> tuple[CompiledStage, ...]:
    """Returns the stages of the plan, not yet compiled."""
    model = MODELS[MODEL.value]
    loss_fn, params, batch = loss_of(
        model,
        model.sizes[SIZE.value],
        batch_size=MICROBATCH_SIZE.value * NUM_MICROBATCHES.value,
        sequence_length=SEQUENCE_LENGTH.value,
    )
    pipelined = jaxptis.pipeline(
        loss_fn,
        num_microbatches=NUM_MICROBATCHES.value,
        devices=devices,
        strategy=STRATEGY.value,
        has_aux=True,
    )
    return pipelined.lower(params, batch)


def compile_chosen(
    stages: Sequence[CompiledStage], device: DeviceSpec, console: Console
) -> list[Inspected]:
    """Returns what is chosen, compiled; equal programs are compiled once."""
    chosen = choose(stages)
    by_text: dict[str, Inspected] = {}
    found = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=len(chosen))
        for stage, kind in chosen:
            layers, program = stages[stage].layers, stages[stage].programs[kind]
            bar.update(task, description=f"compiling {KINDS[kind]} of stage {stage}")
            text = program.as_text("stablehlo")
            if text in by_text:
                same = by_text[text]
                found.append(
                    dataclasses.replace(
                        same, stage=stage, kind=kind, layers=layers, same_as=same.name
                    )
                )
            else:
                by_text[text] = inspect(
                    program, stage=stage, kind=kind, layers=layers, device=device
                )
                found.append(by_text[text])
            bar.advance(task)
    return found


def choose(stages: Sequence[CompiledStage]) -> list[tuple[int, str]]:
    """Returns the stages and kinds that the flags name, of those that there are."""
    for stage in STAGE.value or ():
        if stage >= len(stages):
            sys.exit(f"--stage={stage}, but there are {len(stages)} stages, counted from 0")
    chosen = [
        (index, kind)
        for index, stage in enumerate(stages)
        for kind in stage.programs
        if index in (STAGE.value or range(len(stages))) and kind in (KIND.value or KINDS)
    ]
    if not chosen:
        there = sorted({kind for stage in stages for kind in stage.programs}, key=list(KINDS).index)
        sys.exit(
            f"these stages have no tasks of kind {', '.join(KIND.value or KINDS)}, only of "
            f"{', '.join(there)}; change --kind or --strategy"
        )
    return chosen


def report(found: Sequence[Inspected], console: Console) -> None:
    """Prints a line a program, and then the costliest ops of each distinct one."""
    console.print(programs_of(found))
    for each in found:
        if each.same_as is None:
            console.print()
            console.print(Text(f"{each.name}: {layer_names(each.layers)}", style="bold"))
            console.print(ops_of(each))
    if open_loops := [each.name for each in found if each.num_open_loops]:
        console.print(
            f"\nIn {', '.join(open_loops)} nobody knows how often some loop runs: counted as once"
        )


def programs_of(found: Sequence[Inspected]) -> Table:
    """Returns a line a program: work, memory and collectives."""
    table = Table(
        *("program", "layers", "flops", "of products", "accessed", "arguments", "results"),
        *("overwritten", "temporary", "collectives"),
        box=None,
    )
    for each in found:
        sizes = each.argument_bytes, each.output_bytes, each.overwritten_bytes
        table.add_row(
            each.name,
            str(len(each.layers)),
            count(each.flops),
            count(each.product_flops),
            size(round(each.bytes_accessed)),
            *map(size, sizes),
            size(each.temporary_bytes),
            name_collectives(each),
        )
    table.caption = (
        "flops, accessed: by XLA, a loop once; of products: of matrices, a loop as often as it runs"
    )
    table.caption_justify = "left"
    return table


def ops_of(inspected: Inspected) -> Table:
    """Returns a line for each of the costliest ops."""
    table = Table("share", "at least", "flops", "accessed", "times", "op", "origin", box=None)
    for each in inspected.costliest:
        table.add_row(
            percent(each.share),
            duration(each.roofline_s),
            count(each.op.flops),
            size(round(each.op.bytes_accessed)),
            str(each.op.times),
            Text(each.op.name, overflow="fold"),
            Text(each.op.origin, overflow="fold"),
        )
    return table


def write_texts(found: Sequence[Inspected], folder: pathlib.Path) -> None:
    """Writes the StableHLO and the optimized HLO of each program."""
    folder.mkdir(exist_ok=True)
    for each in found:
        (folder / f"{each.name}.stablehlo.txt").write_text(each.stablehlo)
        (folder / f"{each.name}.hlo.txt").write_text(each.hlo)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
