"""Measures what the executor costs: host time, and CPU time beside a plain step.

python -m experiments.overhead --json_output=experiments/results/overhead.json

First a small LLaMA-2, as a pipeline of four stages on one device, in turns with a plain jitted step
that accumulates gradients; then, with layers that cost nothing, the host's time of every task and
transfer. Each run is added to the file, so that it shows how much they differ.

On the CPU backend XLA's threads spin while they wait for work, and CPU time counts that. On one CPU
there is a single thread: taskset -c 0 python -m experiments.overhead --schedules=
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments.host_time import HostTime, measure_host_time
from experiments.json_output import JSON_OUTPUT, this_run
from experiments.one_device import NUM_STAGES, Comparison, compare, make_config
from jaxptis.schedules import FAMILIES, names_family

SCHEDULES = flags.DEFINE_list("schedules", ["1f1b", "zb-h1"], "Schedules to time the host under.")
MICROBATCHES = flags.DEFINE_list("microbatches", ["8", "32"], "Their numbers of microbatches.")
NUM_DEVICES = flags.DEFINE_integer(
    "num_devices", 4, "Devices to time the host with.", lower_bound=1
)
NUM_HOST_STEPS = flags.DEFINE_integer(
    "num_host_steps", 50, "Steps to time the host for.", lower_bound=1
)
MODEL_WIDTHS = flags.DEFINE_list(
    "model_widths", ["128", "256", "512"], "Of the models on one device, each a multiple of 8."
)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 128, "Tokens predicted in each of their sequences.", lower_bound=1
)
MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 4, "Their sequences in a microbatch.", lower_bound=1
)
NUM_MICROBATCHES = flags.DEFINE_integer("num_microbatches", 8, "Their microbatches.", lower_bound=1)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 20, "How many steps they take, of either kind.", lower_bound=2
)
flags.declare_key_flag("json_output")  # --help lists it

SETTINGS = (
    NUM_DEVICES,
    NUM_HOST_STEPS,
    SEQUENCE_LENGTH,
    MICROBATCH_SIZE,
    NUM_MICROBATCHES,
    NUM_STEPS,
)


def _are_multiples(values: list[str], step: int) -> bool:
    return all(value.isdecimal() and int(value) and int(value) % step == 0 for value in values)


flags.register_validator(
    "schedules",
    lambda values: all(map(names_family, values)),
    f"give names of schedules: {', '.join(FAMILIES)}",
)
flags.register_validator(
    "microbatches", lambda values: _are_multiples(values, 1), "give whole numbers of 1 or more"
)
flags.register_validator(
    "model_widths", lambda values: _are_multiples(values, 8), "give multiples of 8"
)


def main(argv: list[str]) -> None:
    """Measures, prints two tables, and adds the run to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    # Without effect on accelerators; on the CPU backend it makes as many devices as are needed.
    jax.config.update("jax_num_cpu_devices", max(NUM_DEVICES.value, NUM_STAGES))
    # Before the host's, so that it finds the memory as a fresh process has it.
    ratios = {
        width: compare(
            make_config(int(width)),
            num_microbatches=NUM_MICROBATCHES.value,
            microbatch_size=MICROBATCH_SIZE.value,
            sequence_length=SEQUENCE_LENGTH.value,
            num_steps=NUM_STEPS.value,
        )
        for width in MODEL_WIDTHS.value
    }
    times = {
        (schedule, count): measure_host_time(
            schedule,
            num_devices=NUM_DEVICES.value,
            num_microbatches=int(count),
            num_steps=NUM_HOST_STEPS.value,
        )
        for schedule in SCHEDULES.value
        for count in MICROBATCHES.value
    }
    report(ratios, times, Console())
    if JSON_OUTPUT.value is not None:
        path = pathlib.Path(JSON_OUTPUT.value)
        runs = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*runs, to_json(ratios, times)], indent=1) + "\n")


def report(
    ratios: dict[str, list[Comparison]], times: dict[tuple[str, str], HostTime], console: Console
) -> None:
    """Prints the ratios, and the host's microseconds."""
    table = Table(
        "width",
        "recompute",
        "tasks",
        "CPU time",
        "quartiles",
        "wall time",
        title=f"Pipeline of {NUM_STAGES} stages on one device over the plain step",
    )
    for width, comparisons in ratios.items():
        for ratio in comparisons:
            first, _, third = ratio.cpu_quartiles
            table.add_row(
                width,
                ratio.recompute,
                str(ratio.num_tasks),
                f"{ratio.cpu_ratio:.3f}",
                f"{first:.3f} to {third:.3f}",
                f"{ratio.wall_ratio:.3f}",
            )
    console.print(table)
    if not times:
        return
    table = Table(
        "schedule",
        "micro-\nbatches",
        "tasks",
        "trans-\nfers",
        "a task",
        "a transfer",
        "of it\nworking",
        "step\na task",
        "of it\nworking",
        title="Host time in microseconds; waits for the devices left out",
    )
    for (schedule, count), time in times.items():
        task, transfer = (time.operations.get(kind) for kind in ("task", "transfer"))
        table.add_row(
            schedule,
            count,
            str(time.num_tasks),
            str(time.num_transfers),
            "" if task is None else f"{task.call_us + task.loop_us:.1f}",
            "" if transfer is None else f"{transfer.call_us + transfer.loop_us:.1f}",
            "" if transfer is None else f"{transfer.call_thread_us + transfer.loop_us:.1f}",
            f"{time.host_us_per_task:.1f}",
            f"{time.thread_us_per_task:.1f}",
        )
    console.print(table)


def to_json(
    ratios: dict[str, list[Comparison]], times: dict[tuple[str, str], HostTime]
) -> dict[str, Any]:
    """Returns the settings, by the names of their flags, and the figures."""
    return {
        **this_run("overhead", {flag.name: flag.value for flag in SETTINGS}),
        "load_average": os.getloadavg()[0],
        "pipeline_over_plain": [
            {
                "model_width": int(width),
                "recompute": ratio.recompute,
                "num_tasks": ratio.num_tasks,
                "cpu_time": ratio.cpu_ratio,
                "cpu_time_first_quartile": ratio.cpu_quartiles[0],
                "cpu_time_third_quartile": ratio.cpu_quartiles[2],
                "wall_time": ratio.wall_ratio,
            }
            for width, comparisons in ratios.items()
            for ratio in comparisons
        ],
        "host_time": [
            {"schedule": schedule, "num_microbatches": int(count), **dataclasses.asdict(time)}
            for (schedule, count), time in times.items()
        ],
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
