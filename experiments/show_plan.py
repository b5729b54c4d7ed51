"""Shows a plan and its predicted timeline; no device is needed, and nothing is allocated.

python -m experiments.show_plan --model=deepseek --size=V3  # its layers
python -m experiments.show_plan --size=7B --device="NVIDIA H200" --strategy=zb-v
python -m experiments.show_plan --costs=costs.json --strategy=plan.txt --html_output=step.html

The layers are those of a model, of any size, whose costs are estimated; or those of a file that
experiments.measure_layers, `trainer.costs.save` or a person has written. The step is simulated as
the executor runs it: a device takes part in its transfers, and both ends wait until one is over.
"""

import sys
from typing import Any

from absl import app, flags, logging

from experiments.chosen_cluster import OF_CLUSTER, chosen_cluster
from experiments.chosen_costs import DEVICE, OPTIMIZER
from experiments.chosen_layers import (
    COSTS,
    OF_MODEL,
    chosen_layers,
    layers_settings,
)
from experiments.chosen_pipeline import NUM_MICROBATCHES
from experiments.json_output import write_json
from experiments.predicted_step import (
    PredictedStep,
    predicted,
    report,
    to_json,
    why_it_does_not_fit,
)
from experiments.refused import refused_plainly
from experiments.step_outputs import HTML_OUTPUT, STEP_OUTPUTS, write_page
from experiments.wide_console import wide_console
from jaxptis.cluster import DeviceSpec
from jaxptis.make_plan import make_plan
from jaxptis.performance import Costs
from jaxptis.pictures.bottleneck import find_bottleneck

for flag in (COSTS, *OF_MODEL, *OF_CLUSTER, *STEP_OUTPUTS):
    flags.declare_key_flag(flag.name)  # which --help lists
STRATEGY = flags.DEFINE_string(
    "strategy",
    None,
    "A schedule such as 1f1b or zb-v, best to search for one, or the path of a plan file; without "
    "one only the layers are shown.",
)

Json = dict[str, Any]

OF_STEP = (STRATEGY, *OF_CLUSTER)
FOR_A_PLAN = (*OF_STEP, DEVICE, OPTIMIZER, HTML_OUTPUT)


@flags.multi_flags_validator(
    [flag.name for flag in FOR_A_PLAN],
    "without --strategy only layers are shown; add it, or drop "
    + ", ".join(f"--{flag.name}" for flag in FOR_A_PLAN[1:]),
)
def _has_plan(values: Json) -> bool:
    return values["strategy"] is not None or not any(flag.present for flag in FOR_A_PLAN)


def main(argv: list[str]) -> None:
    """Prints the layers, then the plan and what is predicted, and writes the files."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    console = wide_console()
    refusal = None
    chosen = chosen_layers(console, with_costs=STRATEGY.value is not None)
    figures: Json = {"settings": settings(), "layers": chosen.layers}
    if chosen.costs is not None and STRATEGY.value is not None:
        with console.status("planning"):
            step = predict(chosen.costs, STRATEGY.value, chosen.device)
        report(step, console)
        refusal = why_it_does_not_fit(step)
        figures |= {**to_json(step), "refusal": refusal}
        write_page(step, STRATEGY.value)
    write_json(figures)
    if refusal is not None:
        sys.exit(refusal)


def predict(costs: Costs, strategy: str, device: DeviceSpec) -> PredictedStep:
    """Returns the plan of a strategy, and its step on equal devices."""
    with refused_plainly():
        cluster = chosen_cluster(device)
        plan = make_plan(costs, strategy, cluster=cluster, num_microbatches=NUM_MICROBATCHES.value)
        step = predicted(plan, costs, cluster)
        find_bottleneck(step.timeline, plan)  # refuses a step that takes no time
    return step


def settings() -> Json:
    """Returns the flags that count, by name."""
    step = OF_STEP if STRATEGY.value is not None else ()
    return {f.name: f.value for f in (*layers_settings(), *step) if f.value is not None}


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
