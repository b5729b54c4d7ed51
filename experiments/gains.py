r"""Sets steps planned by `best` beside those of interleaved 1F1B, predicted and measured.

python -m experiments.gains --num_devices=4,8 --asleep --slower=4 --num_steps=1 \
    --json_output=experiments/results/gains_asleep.json
MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
python -m experiments.launch --num_processes=2 --pin -- experiments.gains --num_devices=2 \
    --json_output=experiments/results/gains.json

The models are the small ones of each family, with a vocabulary that gives the head the share of a
token's work that it has in a published size. Interleaved 1F1B has as many layers in each stage, and
as many stages on each device as is predicted to be fastest, two or more. A gain is how many times
as long its step takes as that of `best`. A step has two microbatches for each device.

With --asleep the tasks do not compute: they sleep for what the costs say, in the executor as it is,
so that two cores can hold eight devices. What is shown then is not the time of any model.
"""

import dataclasses
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import geometric_mean
from types import MappingProxyType
from typing import Any

import jax
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import distributed
from experiments.refused import refused_plainly
from experiments.sleeping import measure_asleep
from experiments.wide_console import wide_console
from experiments.workload import Workload, measured_workload
from jaxptis.make_plan import BEST, make_plan
from jaxptis.performance import simulate
from jaxptis.plan import Plan
from models import MODELS

PAPER = 1.42
"""The mean gain of AdaPtis over interleaved 1F1B on GPUs (arXiv 2509.23722)."""

VOCABULARIES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "deepseek": ("V3", 512),
        "gemma": ("2B", 4096),
        "llama2": ("7B", 512),
        "nemotron_h": ("8B", 2048),
    }
)
"""The published size of each family whose head is taken after, and the vocabulary that does it."""

MICROBATCHES_OF_A_DEVICE = 2
MICROBATCH_SIZE = 4
SEQUENCE_LENGTH = 128

flags.adopt_module_key_flags(distributed)  # --help lists them
NAMES = flags.DEFINE_list("models", list(VOCABULARIES), "Families of models.")
NUM_DEVICES = flags.DEFINE_list("num_devices", ["2"], "Devices in the pipeline, each in turn.")
NUM_STEPS = flags.DEFINE_integer("num_steps", 5, "Steps to record.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the parameters and the tokens.")
ASLEEP = flags.DEFINE_bool("asleep", False, "Let tasks sleep for what they cost.")
SLOWER = flags.DEFINE_float(
    "slower", 1.0, "How many times as long they sleep, with --asleep.", lower_bound=0.0
)
JSON_OUTPUT = flags.DEFINE_string("json_output", None, "File for the settings and the results.")

SETTINGS = NAMES, NUM_DEVICES, NUM_STEPS, SEED, ASLEEP, SLOWER


@flags.validator("json_output", "its folder does not exist; create it first")
def _has_folder(path: str | None) -> bool:
    return path is None or pathlib.Path(path).absolute().parent.is_dir()


@flags.validator("models", f"give names of families: {', '.join(VOCABULARIES)}")
def _are_models(names: list[str]) -> bool:
    return bool(names) and all(name in VOCABULARIES for name in names)


@flags.validator("num_devices", "give whole numbers of 2 or more, such as 4,8")
def _are_numbers(numbers: list[str]) -> bool:
    return bool(numbers) and all(each.isdecimal() and int(each) > 1 for each in numbers)


@flags.multi_flags_validator(["asleep", "slower"], "--slower is for --asleep; give both")
def _is_asleep(values: dict[str, Any]) -> bool:
    return bool(values["asleep"]) or values["slower"] == 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a plan, predicted and measured; of several the one of median length."""

    predicted_s: float
    measured_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A model on some devices.

    Attributes:
        model: the family.
        num_devices: of the pipeline.
        num_microbatches: of a step.
        strategy: interleaved 1F1B, with its options.
        interleaved: its step.
        best: that of the plan that `best` finds.
        num_stages: of that plan.
    """

    model: str
    num_devices: int
    num_microbatches: int
    strategy: str
    interleaved: Step
    best: Step
    num_stages: int

    @property
    def predicted_gain(self) -> float:
        """How many times as long the interleaved step takes as the best one, as predicted."""
        return self.interleaved.predicted_s / self.best.predicted_s

    @property
    def measured_gain(self) -> float:
        """Likewise, as measured."""
        return self.interleaved.measured_s / self.best.measured_s

    @property
    def ratio(self) -> float:
        """The predicted over the measured gain."""
        return self.predicted_gain / self.measured_gain


def main(argv: list[str]) -> None:
    """Measures, prints a table, and writes it to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    numbers = [int(each) for each in NUM_DEVICES.value]
    with refused_plainly():
        devices = distributed.join(max(numbers))
    if ASLEEP.value and jax.process_count() > 1:
        raise app.UsageError("--asleep is for one process, whose cores hold all devices")
    first = jax.process_index() == 0
    console = wide_console(quiet=not first)
    rows: list[Row] = []
    with Progress(console=console) as bar:
        task = bar.add_task("measuring", total=len(NAMES.value) * len(numbers))
        for name in NAMES.value:
            bar.update(task, description=name)
            for row in gains_of(name, devices, numbers):
                rows.append(row)
                bar.advance(task)
                if JSON_OUTPUT.value is not None and first:
                    text = json.dumps(to_json(rows), indent=1)
                    pathlib.Path(JSON_OUTPUT.value).write_text(text + "\n")
    report(rows, console)


def gains_of(name: str, devices: Sequence[jax.Device], numbers: Sequence[int]) -> Iterator[Row]:
    """Yields the rows of a family."""
    with refused_plainly():
        workload = measured_workload(
            MODELS[name],
            config_of(name),
            devices,
            num_microbatches=MICROBATCHES_OF_A_DEVICE * len(devices),
            microbatch_size=MICROBATCH_SIZE,
            sequence_length=SEQUENCE_LENGTH,
            seed=SEED.value,
            times_slower=SLOWER.value,
        )
        for num_devices in numbers:
            yield gain_of(name, workload.first(num_devices, MICROBATCHES_OF_A_DEVICE * num_devices))


def config_of(name: str) -> Any:
    """Returns the small model of a family, with a head of the size that a published one has."""
    _, vocab_size = VOCABULARIES[name]
    return dataclasses.replace(MODELS[name].sizes["small"], vocab_size=vocab_size)


def gain_of(name: str, workload: Workload) -> Row:
    """Plans both steps, and measures them."""
    num_devices = len(workload.devices)
    plans = {strategy: plan_of(workload, strategy) for strategy in interleaved(workload)}
    strategy = min(plans, key=lambda each: predicted_s(workload, plans[each]))
    best = plan_of(workload, BEST)
    return Row(
        model=name,
        num_devices=num_devices,
        num_microbatches=workload.num_microbatches,
        strategy=strategy,
        interleaved=step_of(workload, plans[strategy]),
        best=step_of(workload, best),
        num_stages=best.num_stages,
    )


def interleaved(workload: Workload) -> Iterator[str]:
    """Yields interleaved 1F1B of as many layers in each stage, of every number of stages."""
    most = len(workload.costs.layers) // len(workload.devices)
    for v in range(2, max(most, 2) + 1):
        yield f"interleaved(v={v}, partition=uniform)"


def plan_of(workload: Workload, strategy: str) -> Plan:
    """Returns the plan of a strategy."""
    return make_plan(
        workload.costs,
        strategy,
        cluster=workload.cluster,
        num_microbatches=workload.num_microbatches,
    )


def predicted_s(workload: Workload, plan: Plan) -> float:
    """Returns the seconds of a step as the executor runs it."""
    return simulate(plan, workload.costs, workload.cluster, blocking=True).step_s


def step_of(workload: Workload, plan: Plan) -> Step:
    """Runs steps, asleep or not."""
    pipelined, params, batch = workload.pipelined(plan), workload.params, workload.batch
    if ASLEEP.value:
        pipeline = pipelined.bind(None, params, batch).compiled.pipeline
        measured = measure_asleep(pipeline, params, batch, NUM_STEPS.value)
    else:
        step = pipelined.train_step(optax.sgd(0.01))
        _, profile = step.profile(step.init(params, batch), batch, NUM_STEPS.value)
        measured = profile.timeline
    return Step(predicted_s=predicted_s(workload, plan), measured_s=measured.step_s)


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the geometric means of the gains, and by how much a predicted one is off at most."""
    return {
        "predicted_gain": geometric_mean(row.predicted_gain for row in rows),
        "measured_gain": geometric_mean(row.measured_gain for row in rows),
        "least_measured_gain": min(row.measured_gain for row in rows),
        "worst_error": max(abs(row.ratio - 1) for row in rows),
    }


def report(rows: Sequence[Row], console: Console) -> None:
    """Prints a line a row, and the means beside the paper's."""
    title = "Tasks sleep for what they cost: these are times of no model" if ASLEEP.value else None
    table = Table(
        *("model", "devices", "microbatches", "interleaved: v", "predicted", "measured"),
        *("best: stages", "predicted", "measured", "gain: predicted", "measured", "ratio"),
        box=None,
        title=title,
    )
    for row in rows:
        steps_s = [f"{s * 1e3:.1f} ms" for step in (row.interleaved, row.best) for s in _both(step)]
        table.add_row(
            row.model,
            str(row.num_devices),
            str(row.num_microbatches),
            row.strategy.partition("v=")[2].partition(",")[0],
            *steps_s[:2],
            str(row.num_stages),
            *steps_s[2:],
            f"{row.predicted_gain:.3f}",
            f"{row.measured_gain:.3f}",
            f"{row.ratio:.3f}",
        )
    console.print(table)
    mean = means(rows)
    console.print(
        f"best over interleaved 1F1B: {mean['measured_gain']:.3f} measured, "
        f"{mean['predicted_gain']:.3f} predicted (geometric means); the paper has {PAPER} on GPUs\n"
        f"least {mean['least_measured_gain']:.3f}; predicted gains are off by "
        f"{mean['worst_error']:.1%} at most"
    )


def _both(step: Step) -> tuple[float, float]:
    return step.predicted_s, step.measured_s


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the settings, by the names of their flags, and the figures."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "num_processes": jax.process_count(),
        "num_cpus": os.cpu_count(),
        "cpus_of_a_process": len(os.sched_getaffinity(0)),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")},
        "command": f"python -m experiments.gains {shlex.join(sys.argv[1:])}",
        "settings": {flag.name: flag.value for flag in SETTINGS}
        | {
            "head_as_in": dict(VOCABULARIES),
            "microbatch_size": MICROBATCH_SIZE,
            "sequence_length": SEQUENCE_LENGTH,
        },
        "paper": PAPER,
        "means": means(rows),
        "rows": [
            dataclasses.asdict(row)
            | {name: getattr(row, name) for name in ("predicted_gain", "measured_gain", "ratio")}
            for row in rows
        ],
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
