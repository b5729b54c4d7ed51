r"""Slows a device of a pipeline in the middle of its training, with and without adapting to it.

python -m experiments.slowed --json_output=experiments/results/slowed.json

Two trainers take the same steps. When a device has become slow, one goes on with its order, and the
other adapts (`trainer.adapt`); from then on they take turns. A third has the stages that adapting
says would be better. The tasks compute, and then sleep until they have taken what was measured of
their layers, times --slower; so a few cores can hold all devices, and what is shown is not the time
of any model. A step is measured from its first task to the end of its last.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import jaxptis
from experiments.compilations import counted_compilations
from experiments.json_output import this_run, write_json
from experiments.refused import refused_plainly
from experiments.sleeping import DrowsyCompiler
from experiments.wide_console import wide_console
from experiments.workload import Workload, measured_workload
from jaxptis.adapt import Adaptation
from models import MODELS

NAME = flags.DEFINE_enum("model", "llama2", list(MODELS), "Family of models; its tiny size.")
STRATEGIES = flags.DEFINE_list(
    "strategies", ["gpipe", "1f1b", "interleaved", "hanayo", "zb-h1"], "Schedules."
)
NUM_DEVICES = flags.DEFINE_integer("num_devices", 4, "Devices in the pipeline.", lower_bound=2)
NUM_MICROBATCHES = flags.DEFINE_integer(
    "num_microbatches", 8, "Parts that each batch is cut into.", lower_bound=1
)
SLOW_DEVICES = flags.DEFINE_list(
    "slow_devices", ["0", "3"], "Devices of which one becomes slow, each in a run of its own."
)
FACTOR = flags.DEFINE_float("factor", 3.0, "How many times as long it takes.", lower_bound=1.0)
SLOWER = flags.DEFINE_float(
    "slower", 16.0, "How many times as long all tasks take as their layers.", lower_bound=1.0
)
NUM_STEPS = flags.DEFINE_integer("num_steps", 3, "Steps to record of each.", lower_bound=1)
flags.declare_key_flag("json_output")  # --help lists it

SEQUENCE_LENGTH = 64  # tokens predicted in each sequence; a microbatch is one sequence
SETTINGS = (
    NAME,
    STRATEGIES,
    NUM_DEVICES,
    NUM_MICROBATCHES,
    SLOW_DEVICES,
    FACTOR,
    SLOWER,
    NUM_STEPS,
)


@flags.multi_flags_validator(
    ["slow_devices", "num_devices"], "give devices of --num_devices, counted from 0"
)
def _are_there(values: dict[str, Any]) -> bool:
    there = {str(device) for device in range(values["num_devices"])}
    return bool(values["slow_devices"]) and there.issuperset(values["slow_devices"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A run of a strategy. Seconds are of steps; measured ones are medians.

    Attributes:
        strategy: the schedule to begin with.
        slow_device: which became slow.
        is_new: whether adapting has found an order that is shorter.
        before_s: before the device becomes slow.
        old_s: of the old order, when it is.
        new_s: of the order after adapting.
        other_s: with the stages that adapting says would be better.
        every_s: each measured step, by the name of its median.
        predicted_old_s: by what adapting has measured.
        predicted_new_s: likewise.
        predicted_other_s: likewise.
        speeds: of the devices, as adapting has found.
        num_compilations: of XLA, from adapting to the end of a first step in the new order.
        loss_error: by how much the losses after all steps differ, as a fraction.
    """

    strategy: str
    slow_device: int
    is_new: bool
    before_s: float
    old_s: float
    new_s: float
    other_s: float
    every_s: dict[str, list[float]]
    predicted_old_s: float
    predicted_new_s: float
    predicted_other_s: float
    speeds: tuple[float, ...]
    num_compilations: int
    loss_error: float


class Run:
    """A training whose devices can be slowed."""

    def __init__(self, workload: Workload, plan: jaxptis.Plan) -> None:
        pipelined = workload.pipelined(plan)
        self._compiler = DrowsyCompiler(workload.devices, plan, workload.costs)
        pipelined.compiler = self._compiler
        self._step = pipelined.train_step(optax.adam(1e-3))
        self._batch = workload.batch
        self._state = self._step.init(workload.params, workload.batch)

    def slow(self, device: int) -> None:
        """Lets a device become slow."""
        self._compiler.factors[device] = FACTOR.value

    def measure_s(self) -> float:
        """Returns how long a step takes that is recorded."""
        self._state, profile = self._step.profile(self._state, self._batch, 1)
        return profile.timeline.step_s

    def adapt(self) -> Adaptation:
        """Adapts the order to what tasks take in a step that is recorded."""
        self._state, adaptation = self._step.adapt(self._state, self._batch, 1)
        return adaptation

    def loss(self) -> float:
        """Returns the loss on the batch."""
        return float(self._step.evaluate(self._state, self._batch)["loss"])


def main(argv: list[str]) -> None:
    """Runs all strategies, prints a table, and writes it to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES.value)
    console = wide_console()
    with refused_plainly():
        workload = measure()
        plans = {name: workload.plan(name) for name in STRATEGIES.value}
    rows = []
    for (strategy, plan), device in itertools.product(plans.items(), map(int, SLOW_DEVICES.value)):
        row, adaptation = compare(strategy, workload, plan, device)
        console.print(f"{strategy}, device {device} is slowed: {adaptation}", markup=False)
        rows.append(row)
        write_json(to_json(rows))
    report(rows, console)


def measure() -> Workload:
    """Returns a model with the costs of its layers, with --slower, and the links."""
    model = MODELS[NAME.value]
    return measured_workload(
        model,
        model.sizes["tiny"],
        jax.devices()[: NUM_DEVICES.value],
        num_microbatches=NUM_MICROBATCHES.value,
        microbatch_size=1,
        sequence_length=SEQUENCE_LENGTH,
        seed=0,
        times_slower=SLOWER.value,
    )


def compare(
    strategy: str, workload: Workload, plan: jaxptis.Plan, device: int
) -> tuple[Row, Adaptation]:
    """Trains in the old order, in the new one, and with other stages."""
    old, new = Run(workload, plan), Run(workload, plan)
    before_s = [run.measure_s() for _ in range(NUM_STEPS.value) for run in (old, new)]
    old.slow(device)
    new.slow(device)
    with counted_compilations() as compilations:
        adaptation = new.adapt()
        new.measure_s()
    for _ in range(2):  # so both take as many steps
        old.measure_s()
    other = Run(dataclasses.replace(workload, cluster=adaptation.cluster), adaptation.other)
    other.slow(device)
    runs = {"old": old, "new": new, "other": other}
    every_s: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(NUM_STEPS.value):
        for name, run in runs.items():
            every_s[name].append(run.measure_s())
    every_s = {"before": before_s, **every_s}
    median_s = {name: statistics.median(each) for name, each in every_s.items()}
    row = Row(
        strategy=strategy,
        slow_device=device,
        is_new=adaptation.is_new,
        before_s=median_s["before"],
        old_s=median_s["old"],
        new_s=median_s["new"],
        other_s=median_s["other"],
        every_s=every_s,
        predicted_old_s=adaptation.before_s,
        predicted_new_s=adaptation.after_s,
        predicted_other_s=adaptation.other_s,
        speeds=adaptation.speeds,
        num_compilations=len(compilations),
        loss_error=abs(new.loss() / old.loss() - 1),
    )
    return row, adaptation


def report(rows: Sequence[Row], console: Console) -> None:
    """Prints a line a strategy: measured steps, and gains, measured and predicted."""
    table = Table(
        *("strategy", "slow", "before", "slowed", "new order", "gain", "predicted", "compilations"),
        *("other stages", "gain", "predicted"),
        box=None,
        title="Tasks sleep for what they cost: these are times of no model",
    )
    for row in rows:
        table.add_row(
            row.strategy,
            str(row.slow_device),
            milliseconds(row.before_s),
            milliseconds(row.old_s),
            milliseconds(row.new_s) if row.is_new else "none",
            f"{1 - row.new_s / row.old_s:.1%}",
            f"{1 - row.predicted_new_s / row.predicted_old_s:.1%}",
            str(row.num_compilations),
            milliseconds(row.other_s),
            f"{1 - row.other_s / row.new_s:.1%}",
            f"{1 - row.predicted_other_s / row.predicted_new_s:.1%}",
        )
    console.print(table)


def milliseconds(seconds: float) -> str:
    """Returns seconds in words."""
    return f"{seconds * 1e3:.0f} ms"


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the settings, by the names of their flags, and the figures."""
    return {
        **this_run("slowed", {flag.name: flag.value for flag in SETTINGS}),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
