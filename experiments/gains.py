r"""Sets steps planned by `best` beside those of interleaved 1F1B, predicted and measured.

python -m experiments.gains --num_devices=4,8 --asleep --slower=4 --num_steps=3 \
    --json_output=experiments/results/gains_asleep.json
MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
python -m experiments.launch --num_processes=2 --pin -- experiments.gains --num_devices=2 \
    --json_output=experiments/results/gains.json

The models are small ones, whose heads have the share of the work that they have in published ones.
Interleaved 1F1B has as many layers in each stage, and as many stages on each device, two or more,
as are predicted to be fastest. A gain is how many times as long its step takes as that of `best`.
A step has two microbatches for each device.

With --asleep the tasks do not compute: they sleep for what the costs say, in the executor as it is,
so that two cores can hold eight devices. What is shown then is not the time of any model.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax
from absl import app, flags, logging
from rich.progress import Progress

from experiments import chosen_sleep, distributed, json_output
from experiments.chosen_sleep import ASLEEP, SLOWER, sleep_title
from experiments.gain import PAPER, Gain, Step, conclusion, means, table
from experiments.json_output import this_run, write_json
from experiments.refused import refused_plainly
from experiments.sleeping import measure_asleep
from experiments.uneven_models import HEADS, uneven_config
from experiments.wide_console import wide_console
from experiments.workload import Workload, measured_workload
from jaxptis.make_plan import BEST
from jaxptis.performance import simulate
from jaxptis.plan import Plan
from models import MODELS

MICROBATCHES_OF_A_DEVICE = 2
MICROBATCH_SIZE = 4
SEQUENCE_LENGTH = 128

for module in distributed, chosen_sleep, json_output:
    flags.adopt_module_key_flags(module)  # --help lists them
NAMES = flags.DEFINE_list("models", list(HEADS), "Families of models.")
NUM_DEVICES = flags.DEFINE_list("num_devices", ["2"], "Devices in the pipeline, each in turn.")
NUM_STEPS = flags.DEFINE_integer("num_steps", 5, "Steps to record.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the parameters and the tokens.")

SETTINGS = NAMES, NUM_DEVICES, NUM_STEPS, SEED, ASLEEP, SLOWER


@flags.validator("models", f"give names of families: {', '.join(HEADS)}")
def _are_models(names: list[str]) -> bool:
    return bool(names) and all(name in HEADS for name in names)


@flags.validator("num_devices", "give whole numbers of 2 or more, such as 4,8")
def _are_numbers(numbers: list[str]) -> bool:
    return bool(numbers) and all(each.isdecimal() and int(each) > 1 for each in numbers)


def main(argv: list[str]) -> None:
    """Measures, prints a table, and writes it to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    numbers = [int(each) for each in NUM_DEVICES.value]
    with refused_plainly():
        devices = chosen_sleep.join(max(numbers))
    first = jax.process_index() == 0
    console = wide_console(quiet=not first)
    rows: list[Gain] = []
    with Progress(console=console) as bar:
        task = bar.add_task("measuring", total=len(NAMES.value) * len(numbers))
        for name in NAMES.value:
            bar.update(task, description=name)
            for row in gains_of(name, devices, numbers):
                rows.append(row)
                bar.advance(task)
                if first:
                    write_json(to_json(rows))
    console.print(table(rows, sleep_title()))
    console.print(conclusion(rows))


def gains_of(name: str, devices: Sequence[jax.Device], numbers: Sequence[int]) -> Iterator[Gain]:
    """Yields the rows of a family."""
    with refused_plainly():
        workload = measured_workload(
            MODELS[name],
            uneven_config(name),
            devices,
            num_microbatches=MICROBATCHES_OF_A_DEVICE * len(devices),
            microbatch_size=MICROBATCH_SIZE,
            sequence_length=SEQUENCE_LENGTH,
            seed=SEED.value,
            times_slower=SLOWER.value,
        )
    for num_devices in numbers:
        yield gain_of(name, workload.first(num_devices, MICROBATCHES_OF_A_DEVICE * num_devices))


def gain_of(name: str, workload: Workload) -> Gain:
    """Plans both steps, and measures them."""
    with refused_plainly():
        plans = {strategy: workload.plan(strategy) for strategy in interleaved(workload)}
        best = workload.plan(BEST)
    fastest = min(plans, key=lambda strategy: predicted_s(workload, plans[strategy]))
    return Gain(
        model=name,
        num_devices=len(workload.devices),
        num_microbatches=workload.num_microbatches,
        interleaved=measure(workload, fastest, plans[fastest]),
        best=measure(workload, BEST, best),
    )


def interleaved(workload: Workload) -> Iterator[str]:
    """Yields interleaved 1F1B of as many layers in each stage, of every number of stages."""
    most = len(workload.costs.layers) // len(workload.devices)
    for v in range(2, max(most, 2) + 1):
        yield f"interleaved(v={v}, partition=uniform)"


def predicted_s(workload: Workload, plan: Plan) -> float:
    """Returns the seconds of a step as the executor runs it."""
    return simulate(plan, workload.costs, workload.cluster, blocking=True).step_s


def measure(workload: Workload, strategy: str, plan: Plan) -> Step:
    """Runs steps, asleep or not."""
    pipelined, params, batch = workload.pipelined(plan), workload.params, workload.batch
    if ASLEEP.value:
        pipeline = pipelined.bind(None, params, batch).compiled.pipeline
        measured = measure_asleep(pipeline, params, batch, NUM_STEPS.value)
    else:
        step = pipelined.train_step(optax.sgd(0.01))
        _, profile = step.profile(step.init(params, batch), batch, NUM_STEPS.value)
        measured = profile.timeline
    return Step(
        strategy=strategy,
        num_stages=plan.num_stages,
        predicted_s=predicted_s(workload, plan),
        measured_s=measured.step_s,
    )


def to_json(rows: Sequence[Gain]) -> dict[str, Any]:
    """Returns the settings, by the names of their flags, and the figures."""
    settings = {flag.name: flag.value for flag in SETTINGS} | {
        "head_as_in": dict(HEADS),
        "microbatch_size": MICROBATCH_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
    }
    return {
        **this_run("gains", settings),
        "paper": PAPER,
        "means": means(rows),
        "rows": [row.to_json() for row in rows],
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
