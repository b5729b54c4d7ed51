"""Plans a step: the plan, how far it can be from the best, and what other strategies would take.

python -m experiments.plan --costs=costs.json --num_devices=8 --plan_output=plan.txt
python -m experiments.plan --size=70B --device="NVIDIA H200" --num_devices=16 --num_microbatches=64
python -m experiments.train --strategy=plan.txt ...  # if the costs are those of its layers

Needs no device. The layers are those of a model, with estimated costs, or of a file of costs. Steps
are simulated as the executor runs them: a device takes part in its transfers. What no step falls
below is proven, for transfers that take no time.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from absl import app, flags, logging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from experiments.chosen_cluster import OF_CLUSTER, chosen_cluster
from experiments.chosen_layers import (
    COSTS,
    OF_MODEL,
    chosen_layers,
    layers_settings,
)
from experiments.chosen_pipeline import NUM_MICROBATCHES
from experiments.json_output import has_folder, write_json
from experiments.predicted_step import (
    PredictedStep,
    predicted,
    report,
    to_json,
    why_it_does_not_fit,
)
from experiments.refused import refused_plainly
from experiments.search_bar import search_bar
from experiments.step_outputs import STEP_OUTPUTS, write_page
from experiments.tried import BASE, Tried, attempt
from experiments.wide_console import wide_console
from jaxptis.cluster import Cluster
from jaxptis.make_plan import ADAPTIS, BASELINES, BEST, make_plan
from jaxptis.optimizer import best_plan
from jaxptis.optimizer.certificate import Certificate, certify
from jaxptis.performance import Costs
from jaxptis.pictures.bottleneck import find_bottleneck
from jaxptis.pictures.words import duration, percent, size

for flag in (COSTS, *OF_MODEL, *OF_CLUSTER, *STEP_OUTPUTS):
    flags.declare_key_flag(flag.name)  # which --help lists
STRATEGY = flags.DEFINE_string(
    "strategy", BEST, "What plans: best, adaptis, mist, a schedule, or the path of a plan file."
)
TIME_LIMIT_S = flags.DEFINE_float(
    "time_limit_s",
    10.0,
    "How long best searches, on about two cores; the same finds the same on any machine.",
    lower_bound=0.1,
)
PLAN_OUTPUT = flags.DEFINE_string("plan_output", None, "File for the plan, which is a strategy.")

Json = dict[str, Any]


flags.register_validator("plan_output", has_folder, "its folder does not exist; create it first")


def main(argv: list[str]) -> None:
    """Prints the layers, the plan, its certificate and a table, and writes the files."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    console = wide_console()
    chosen = chosen_layers(console, with_costs=True)
    costs = chosen.costs
    assert costs is not None
    with refused_plainly():
        cluster = chosen_cluster(chosen.device)
        certificate = certify(costs, cluster, NUM_MICROBATCHES.value)
    names = track((*BASELINES, ADAPTIS), console=console, transient=True, description="baselines")
    others = [attempt(name, costs, cluster, NUM_MICROBATCHES.value) for name in names]
    with refused_plainly():
        step = plan_step(costs, cluster, others, certificate, console)
        find_bottleneck(step.timeline, step.plan)  # refuses a step that takes no time
    report(step, console)
    console.print()
    console.print(Text(certificate.text(step.timeline.step_s)))
    rows = [*others, Tried(STRATEGY.value, step, why_it_does_not_fit(step))]
    console.print()
    console.print(table_of(rows, certificate))
    if PLAN_OUTPUT.value is not None:
        step.plan.save(PLAN_OUTPUT.value)
    write_page(step, STRATEGY.value)
    write_json(figures_of(step, certificate, rows) | {"layers": chosen.layers})
    if rows[-1].refusal:
        sys.exit(rows[-1].refusal)


def plan_step(
    costs: Costs,
    cluster: Cluster,
    others: Iterable[Tried],
    certificate: Certificate,
    console: Console,
) -> PredictedStep:
    """Returns the step of --strategy; best is no worse than all others."""
    count = NUM_MICROBATCHES.value
    if STRATEGY.value == BEST:
        with search_bar(console, certificate) as show:
            plan = best_plan(
                costs,
                cluster,
                count,
                others=[each.step.plan for each in others if each.step],
                time_limit_s=TIME_LIMIT_S.value,
                on_progress=show,
            )
    else:
        with console.status(f"planning: {STRATEGY.value}"):
            plan = make_plan(costs, STRATEGY.value, cluster=cluster, num_microbatches=count)
    return predicted(plan, costs, cluster)


def table_of(rows: Iterable[Tried], certificate: Certificate) -> Table:
    """Returns a line a strategy; those that cannot plan this are left out."""
    planned = [(row, row.step.timeline) for row in rows if row.step is not None]
    base_s = next((timeline.step_s for row, timeline in planned if row.strategy == BASE), None)
    table = Table(
        *("strategy", "step", "against it", "bubble", "peak memory", "gap at most", ""),
        box=None,
        caption=f"against it: how many times as fast as {BASE}",
        caption_justify="left",
    )
    for row, timeline in planned:
        table.add_row(
            Text(row.strategy),
            duration(timeline.step_s),
            "" if base_s is None else f"{base_s / timeline.step_s:.3f}",
            percent(statistics.fmean(timeline.bubble)),
            size(max(curve.peak_bytes for curve in timeline.memory)),
            f"{certificate.gap(timeline.step_s):.2%}",
            "lacks memory" if row.refusal else "",
        )
    return table


def figures_of(step: PredictedStep, certificate: Certificate, rows: Iterable[Tried]) -> Json:
    """Returns all figures, times in seconds and sizes in bytes, and the flags that count."""
    given = (*layers_settings(), STRATEGY, TIME_LIMIT_S, *OF_CLUSTER)
    return {
        "settings": {flag.name: flag.value for flag in given if flag.value is not None},
        **to_json(step),
        "gap": certificate.gap(step.timeline.step_s),
        "bounds": [dataclasses.asdict(bound) for bound in certificate.bounds],
        "strategies": [
            {
                "strategy": row.strategy,
                "step_s": row.step and row.step.timeline.step_s,
                "bubble": row.step and statistics.fmean(row.step.timeline.bubble),
                "peak_bytes": row.step and max(x.peak_bytes for x in row.step.timeline.memory),
                "refusal": row.refusal,
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
