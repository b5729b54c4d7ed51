r"""Compares what is predicted of steps with what they take: models x strategies, on these devices.

MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
python -m experiments.launch --num_processes=2 --pin -- experiments.compare --num_devices=2 \
    --size=small --num_steps=3 --json_output=experiments/results/compare.json
python -m experiments.compare --size=small --num_devices=4 --asleep --slower=8 --num_steps=1 \
    --json_output=experiments/results/compare_asleep_P4.json
python -m experiments.compare --size=small --num_devices=8 --num_microbatches=16 --asleep \
    --slower=8 --num_steps=1 --json_output=experiments/results/compare_asleep_P8.json

Costs of layers, and links, are measured here, once for each model, on the parameters and tokens of
its steps. A step is measured from its first task to the end of its last; "plain" is how long steps
take that nothing records, with their update. The variables keep glibc from giving large arrays
fresh pages in every program.

With --asleep the tasks do not compute: they sleep for what the costs say, in the executor as it is,
so that two cores can hold eight devices. What is shown then is not the time of any model.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence
from random import Random
from typing import Any

import jax
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxptis
from experiments import chosen_sleep, distributed, json_output
from experiments.chosen_sleep import ASLEEP, SLOWER, sleep_title
from experiments.json_output import this_run, write_json
from experiments.random_plan import random_plan
from experiments.refused import refused_plainly
from experiments.sleeping import measure_asleep
from experiments.wide_console import wide_console
from experiments.workload import Workload, measured_workload
from jaxptis.performance import Costs, Timeline
from models import MODELS, Model

RANDOM = "random"
INTERLEAVED = "interleaved"

for module in distributed, chosen_sleep, json_output:
    flags.adopt_module_key_flags(module)  # --help lists them
NAMES = flags.DEFINE_list("models", list(MODELS), "Families of models.")
SIZE = flags.DEFINE_string("size", "tiny", "Which size of each.")
STRATEGIES = flags.DEFINE_list(
    "strategies",
    ["gpipe", "1f1b", INTERLEAVED, "zb-h1", "zb-v", RANDOM],
    f'Schedules, paths of plans, or "{RANDOM}": a random plan, of --seed.',
)
NUM_DEVICES = flags.DEFINE_integer("num_devices", 2, "Devices in the pipeline.", lower_bound=1)
NUM_MICROBATCHES = flags.DEFINE_integer(
    "num_microbatches", 8, "Parts that each batch is cut into.", lower_bound=1
)
MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 4, "Sequences in a microbatch.", lower_bound=1
)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 128, "Tokens predicted in each sequence.", lower_bound=1
)
NUM_STEPS = flags.DEFINE_integer("num_steps", 9, "Steps to record.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the tokens and of the random plan.")
HTML_OUTPUT = flags.DEFINE_string(
    "html_output", None, "Folder for a page of every step: what was predicted above what was."
)

SETTINGS = (
    NAMES,
    SIZE,
    STRATEGIES,
    NUM_DEVICES,
    NUM_MICROBATCHES,
    MICROBATCH_SIZE,
    SEQUENCE_LENGTH,
    NUM_STEPS,
    SEED,
    ASLEEP,
    SLOWER,
)


@flags.validator("html_output", "the folder does not exist; create it first")
def _is_folder(path: str | None) -> bool:
    return path is None or pathlib.Path(path).is_dir()


@flags.validator("strategies", "give at least one")
def _are_some(names: list[str]) -> bool:
    return bool(names)


@flags.validator("models", f"give names of families: {', '.join(MODELS)}")
def _are_models(names: list[str]) -> bool:
    return bool(names) and all(name in MODELS for name in names)


@flags.multi_flags_validator(["size", "models"], "not every family has this size; see models/")
def _have_size(values: dict[str, Any]) -> bool:
    return all(values["size"] in MODELS[name].sizes for name in values["models"] if name in MODELS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A step of a model by a strategy.

    Attributes:
        model: the family.
        strategy: the plan.
        predicted_s: of the step.
        measured_s: likewise; the median of those recorded.
        plain_s: of a step that is not recorded, with its update, the median; None of one asleep.
        predicted_bubble: the fraction of the step in which devices idle, the mean.
        measured_bubble: likewise.
        predicted_bytes: the largest peak of a device.
        accounted_bytes: likewise, of the executor; None of one asleep, which has no programs.
        memory_ratio: of these, on the device where they differ most.
    """

    model: str
    strategy: str
    predicted_s: float
    measured_s: float
    plain_s: float | None
    predicted_bubble: float
    measured_bubble: float
    predicted_bytes: int
    accounted_bytes: int | None
    memory_ratio: float | None

    @property
    def ratio(self) -> float:
        """Predicted over measured step."""
        return self.predicted_s / self.measured_s


def main(argv: list[str]) -> None:
    """Measures, prints a table, and writes it to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    with refused_plainly():
        devices = chosen_sleep.join(NUM_DEVICES.value)
    first = jax.process_index() == 0
    console = wide_console(quiet=not first)
    rows: list[Row] = []
    with Progress(console=console) as bar:
        task = bar.add_task("measuring", total=len(NAMES.value) * len(STRATEGIES.value))
        for name in NAMES.value:
            bar.update(task, description=name)
            for row in compare(name, MODELS[name], devices):
                rows.append(row)
                bar.advance(task)
                if first:
                    write_json(to_json(rows))
    report(rows, console)


def compare(name: str, model: Model, devices: Sequence[jax.Device]) -> Any:
    """Yields a row for each strategy."""
    with refused_plainly():
        workload = measured_workload(
            model,
            model.sizes[SIZE.value],
            devices,
            num_microbatches=NUM_MICROBATCHES.value,
            microbatch_size=MICROBATCH_SIZE.value,
            sequence_length=SEQUENCE_LENGTH.value,
            seed=SEED.value,
            times_slower=SLOWER.value,
        )
    plans = {name: name if name != RANDOM else draw(workload.costs) for name in STRATEGIES.value}
    with refused_plainly():  # before the first is run
        for plan in plans.values():
            workload.plan(plan)
    of = of_one_asleep if ASLEEP.value else of_one
    for strategy, plan in plans.items():
        yield of(name, strategy, workload, plan, f"{name} {SIZE.value}, {strategy}")


def draw(costs: Costs) -> jaxptis.Plan:
    """Returns a random plan for these layers."""
    return random_plan(
        Random(SEED.value),
        layers=[layer.name for layer in costs.layers],
        num_microbatches=NUM_MICROBATCHES.value,
        num_devices=NUM_DEVICES.value,
    )


def of_one(
    name: str, strategy: str, workload: Workload, plan: str | jaxptis.Plan, title: str
) -> Row:
    """Runs steps that compute."""
    pipelined, batch = workload.pipelined(plan), workload.batch
    # Of sgd there is no state; costs do not know the optimizer's.
    step = pipelined.train_step(optax.sgd(0.01))
    _, profile = step.profile(step.init(workload.params, batch), batch, NUM_STEPS.value)
    predicted, measured = pipelined.timeline, profile.timeline
    draw_page(predicted, measured, pipelined.plan, f"{name}.{strategy}", title)
    pairs = [
        (curve.peak_bytes, accounted.peak_bytes)
        for curve, accounted in zip(predicted.memory, pipelined.memory, strict=True)
    ]
    return dataclasses.replace(
        _row(name, strategy, predicted, measured),
        plain_s=statistics.median(profile.plain_s),
        accounted_bytes=max(accounted for _, accounted in pairs),
        memory_ratio=max((a / b for a, b in pairs), key=lambda ratio: abs(ratio - 1)),
    )


def of_one_asleep(
    name: str, strategy: str, workload: Workload, plan: str | jaxptis.Plan, title: str
) -> Row:
    """Runs steps whose tasks sleep."""
    params, batch = workload.params, workload.batch
    pipeline = workload.pipelined(plan).bind(None, params, batch).compiled.pipeline
    measured = measure_asleep(pipeline, params, batch, NUM_STEPS.value)
    predicted = pipeline.timeline
    draw_page(predicted, measured, pipeline.plan, f"{name}.{strategy}", f"{title}, tasks asleep")
    return _row(name, strategy, predicted, measured)


def _row(name: str, strategy: str, predicted: Timeline, measured: Timeline) -> Row:
    return Row(
        model=name,
        strategy=strategy,
        predicted_s=predicted.step_s,
        measured_s=measured.step_s,
        plain_s=None,
        predicted_bubble=statistics.fmean(predicted.bubble),
        measured_bubble=statistics.fmean(measured.bubble),
        predicted_bytes=max(curve.peak_bytes for curve in predicted.memory),
        accounted_bytes=None,
        memory_ratio=None,
    )


def draw_page(
    predicted: Timeline, measured: Timeline, plan: jaxptis.Plan, file: str, title: str
) -> None:
    """Writes a page into --html_output, if it is given."""
    if HTML_OUTPUT.value is not None and jax.process_index() == 0:
        path = pathlib.Path(HTML_OUTPUT.value) / f"{file.replace('/', '_')}.html"
        predicted.save(path, measured=measured, plan=plan, title=title)


def report(rows: Sequence[Row], console: Console) -> None:
    """Prints a line a step, and how far predictions are off."""
    table = Table(
        *("model", "strategy", "predicted", "measured", "ratio", "plain", "bubble", "measured"),
        *("memory", "ratio", "to interleaved"),
        box=None,
        title=sleep_title(),
    )
    interleaved_s = {row.model: row.measured_s for row in rows if row.strategy == INTERLEAVED}
    for row in rows:
        base_s = interleaved_s.get(row.model)
        table.add_row(
            row.model,
            row.strategy,
            f"{row.predicted_s * 1e3:.1f} ms",
            f"{row.measured_s * 1e3:.1f} ms",
            f"{row.ratio:.3f}",
            "" if row.plain_s is None else f"{row.plain_s * 1e3:.1f} ms",
            f"{row.predicted_bubble:.1%}",
            f"{row.measured_bubble:.1%}",
            f"{row.predicted_bytes / 1e6:.1f} MB",
            "" if row.memory_ratio is None else f"{row.memory_ratio:.3f}",
            "" if base_s is None else f"{row.measured_s / base_s:.3f}",
        )
    console.print(table)
    median, worst = errors(rows)
    console.print(f"predicted over measured: off by {median:.1%} (median), {worst:.1%} (worst)")


def errors(rows: Sequence[Row]) -> tuple[float, float]:
    """Returns by how much predicted steps are off, as a fraction: the median and the worst."""
    off = [abs(row.ratio - 1) for row in rows]
    return statistics.median(off), max(off)


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the settings, by the names of their flags, and the figures."""
    median, worst = errors(rows)
    return {
        **this_run("compare", {flag.name: flag.value for flag in SETTINGS}),
        "median_error": median,
        "worst_error": worst,
        "rows": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows],
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
