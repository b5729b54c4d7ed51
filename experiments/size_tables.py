"""Plans the published sizes of all families for GPUs with 80 GB, by every strategy.

python -m experiments.size_tables --time_limit_s=4 \
    --json_output=experiments/results/size_tables.json

Costs are of an H200 in bfloat16, for microbatches of a sequence of 4096 tokens; see size_costs.
Best plans with the head whole, in two slices and in four, each of which was measured; others have
the head whole. best starts from their plans, with all slices in the place of the head.
Parameters, gradients and the two moments of AdamW, all float32, count in the memory. Eight devices
are a node, with NVLink inside and InfiniBand outside. A baseline that lacks memory is tried once
more with stages that recompute all. Ratios are another's step over that of best.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from absl import app, flags, logging
from rich.table import Table
from rich.text import Text

from experiments.predicted_step import new_table, predicted, why_it_does_not_fit
from experiments.size_costs import DEVICE, size_costs
from experiments.tried import BASE, Tried, attempt, recomputing
from experiments.wide_console import wide_console
from jaxptis.cluster import Cluster, Link
from jaxptis.make_plan import ADAPTIS, BASELINES, BEST
from jaxptis.optimizer import best_plan
from jaxptis.optimizer.certificate import certify
from jaxptis.performance import Costs
from jaxptis.pictures.words import duration, size
from jaxptis.plan import Plan

ALL_MODELS = (
    *("gemma:7B", "nemotron_h:8B", "nemotron_h:56B", "deepseek:V2-Lite", "deepseek:V3"),
    *("llama2:7B", "llama2:13B", "llama2:70B"),
)
UNEVEN = "gemma", "deepseek", "nemotron_h"  # families
MEMORY_BYTES = 80 * 10**9
MICROBATCHES = 2  # a device
HEAD_SLICES = 1, 2, 4  # that best tries
WHOLE = f"{BEST}(head_slices=1)"
NODE = 8  # devices
IN_NODE = Link(latency_s=5e-6, bytes_per_s=450e9)  # NVLink 4 of NVIDIA's data sheet, each way
BETWEEN_NODES = Link(latency_s=1e-5, bytes_per_s=50e9)  # 400 Gb/s a device

MODELS = flags.DEFINE_list("models", list(ALL_MODELS), "Family and size of each.")
NUM_DEVICES = flags.DEFINE_list("num_devices", ["8", "16", "32", "64"], "Of the pipelines.")
TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 10.0, "Of each search.", lower_bound=0.1)
JSON_OUTPUT = flags.DEFINE_string(
    "json_output", None, "File for rows and means; rows that are in it are not planned again."
)

Json = dict[str, Any]


@flags.validator("models", f"give some of {', '.join(ALL_MODELS)}")
def _are_models(values: list[str]) -> bool:
    return bool(values) and set(values) <= set(ALL_MODELS)


@flags.validator("num_devices", "give whole numbers of 1 or more, with commas between")
def _are_counts(values: list[str]) -> bool:
    return bool(values) and all(value.isdecimal() and int(value) > 0 for value in values)


@flags.validator("json_output", "its folder does not exist; create it first")
def _has_folder(path: str | None) -> bool:
    return path is None or Path(path).absolute().parent.is_dir()


def main(argv: Sequence[str]) -> None:
    """Prints a table of each model and number of devices, then a line of each, and means."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    console = wide_console()
    path = JSON_OUTPUT.value and Path(JSON_OUTPUT.value)
    rows = read(path) if path and path.exists() else []
    done = {(row["model"], row["num_devices"]) for row in rows}
    for model in MODELS.value:
        family, size_of_family = model.split(":")
        costs = {count: size_costs(family, size_of_family, count) for count in HEAD_SLICES}
        for num_devices in map(int, NUM_DEVICES.value):
            if (model, num_devices) in done:
                continue
            rows.append({"model": model, "num_devices": num_devices, **plan(costs, num_devices)})
            console.print(Text(f"\n{model} on {num_devices} devices"))
            console.print(strategies_of(rows[-1]))
            if path:
                write(rows, path)
    console.print()
    console.print(summary(rows))
    for mean in means(rows):
        console.print(Text("  ".join(f"{name} {value}" for name, value in mean.items())))


def read(path: Path) -> list[Json]:
    """Returns the rows of an earlier run; exits if its settings were others."""
    figures = json.loads(path.read_text())
    if figures["settings"] != settings():
        sys.exit(f"{path} was written with other settings, {figures['settings']}; remove it")
    rows: list[Json] = figures["rows"]
    return rows


def write(rows: Sequence[Json], path: Path) -> None:
    """Writes the rows so far, so that they outlive an interruption."""
    figures = {"settings": settings(), "means": means(rows), "rows": rows}
    path.write_text(json.dumps(figures, indent=1) + "\n")


def settings() -> Json:
    """Returns what holds for all rows."""
    return {
        "time_limit_s": TIME_LIMIT_S.value,
        "strategies": [*BASELINES, ADAPTIS],
        "head_slices": [*HEAD_SLICES],
        "memory_bytes": MEMORY_BYTES,
        "microbatches_per_device": MICROBATCHES,
        "devices_per_node": NODE,
        "link_in_node": dataclasses.asdict(IN_NODE),
        "link_between_nodes": dataclasses.asdict(BETWEEN_NODES),
    }


def cluster_of(num_devices: int) -> Cluster:
    """Returns nodes of equal devices."""
    device = dataclasses.replace(DEVICE, memory_bytes=MEMORY_BYTES)
    pairs = permutations(range(num_devices), 2)
    links = {(a, b): IN_NODE for a, b in pairs if a // NODE == b // NODE}
    return Cluster((device,) * num_devices, BETWEEN_NODES, links)


def plan(costs: Mapping[int, Costs], num_devices: int) -> Json:
    """Returns what every strategy takes, and what is proven; or why nothing can be planned.

    Args:
        costs: by the number of slices of the head.
        num_devices: of the pipeline.
    """
    cluster, count, whole = cluster_of(num_devices), MICROBATCHES * num_devices, costs[1]
    row: Json = {"costs": whole.source, "num_layers": len(whole.layers), "num_microbatches": count}
    try:
        certificates = {k: certify(each, cluster, count) for k, each in costs.items()}
    except ValueError as error:
        return {**row, "refusal": str(error)}
    names = (*BASELINES, ADAPTIS)
    tried = [recomputing(attempt(x, whole, cluster, count), whole, cluster) for x in names]
    began_s = time.perf_counter()
    plans = [each.step.plan for each in tried if each.step and not each.refusal]
    found = {
        k: search(costs[k], cluster, count, [sliced(each, costs[k]) for each in plans])
        for k in HEAD_SLICES
    }
    search_s = round(time.perf_counter() - began_s, 1)
    steps_s = {k: x.step.timeline.step_s for k, x in found.items() if x.step and not x.refusal}
    best = min(steps_s, key=steps_s.__getitem__, default=1)
    return {
        **row,
        "search_s": search_s,
        "bound_s": certificates[1].bound_s,
        "binds": certificates[1].bounds[0].binds,
        "bound_with_slices_s": min(each.bound_s for each in certificates.values()),
        "strategies": [
            *(figures(each, each.strategy, 1) for each in tried),
            figures(found[1], WHOLE, 1),
            figures(found[best], BEST, best),
        ],
    }


def figures(tried: Tried, name: str, head_slices: int) -> Json:
    """Returns what a file has of a strategy."""
    step = tried.step
    return {
        "strategy": name,
        "head_slices": head_slices,
        "step_s": step and step.timeline.step_s,
        "num_stages": step and len(step.plan.stages),
        "recompute": step and sorted({x.recompute for x in step.plan.stages}),
        "peak_bytes": step and max(x.peak_bytes for x in step.timeline.memory),
        "refusal": tried.refusal,
    }


def sliced(plan: Plan, costs: Costs) -> Plan:
    """Returns a plan whose last stage has the slices of a head, where it has that as a whole."""
    *stages, last = plan.stages
    slices = (layer.name for layer in costs.layers[len(plan.layers) - 1 :])
    last = dataclasses.replace(last, layers=(*last.layers[:-1], *slices))
    return dataclasses.replace(plan, stages=(*stages, last))


def search(costs: Costs, cluster: Cluster, num_microbatches: int, others: Sequence[Plan]) -> Tried:
    """Returns what best finds, which is no worse than other plans that fit."""
    try:
        found = best_plan(
            costs,
            cluster,
            num_microbatches,
            others=others,
            time_limit_s=TIME_LIMIT_S.value,
        )
    except ValueError as error:
        return Tried(BEST, None, str(error))
    step = predicted(found, costs, cluster)
    return Tried(BEST, step, why_it_does_not_fit(step))


def steps_s(row: Json) -> dict[str, float]:
    """Returns the steps of the strategies that fit the memory."""
    tried = row.get("strategies", ())
    return {x["strategy"]: x["step_s"] for x in tried if x["step_s"] and not x["refusal"]}


def ratios(row: Json, of: str = BEST) -> dict[str, float]:
    """Returns other steps over that of best: of interleaved, and of the shortest baseline."""
    found = steps_s(row)
    others = {"interleaved": [BASE], "best baseline": BASELINES}
    return {
        name: min(found[each] for each in strategies if each in found) / found[of]
        for name, strategies in others.items()
        if of in found and found.keys() & set(strategies)
    }


def gap(row: Json, strategy: str) -> str:
    """Returns by how much a step is longer than that of any plan; best may cut the head."""
    bound_s = row["bound_with_slices_s" if strategy == BEST else "bound_s"]
    return f"{steps_s(row)[strategy] / bound_s - 1:.2%}"


def strategies_of(row: Json) -> Table | Text:
    """Returns a line a strategy that can plan this, or why none can."""
    if "refusal" in row:
        return Text(row["refusal"])
    table = new_table(
        *("strategy", "head slices", "step", "gap at most"),
        *("stages", "recompute", "peak memory", ""),
    )
    for each in row["strategies"]:
        if each["step_s"] is not None:
            table.add_row(
                Text(each["strategy"]),
                str(each["head_slices"]),
                duration(each["step_s"]),
                "" if each["refusal"] else gap(row, each["strategy"]),
                str(each["num_stages"]),
                ", ".join(each["recompute"]),
                size(each["peak_bytes"]),
                "lacks memory" if each["refusal"] else "",
            )
    return table


def summary(rows: Iterable[Json]) -> Table:
    """Returns a line a model and number of devices; empty where nothing can be planned."""
    table = new_table(
        *("model", "devices", BEST, "slices", "gap", "whole head", "gap", ADAPTIS, "gap"),
        *("interleaved", "over interleaved", "over baselines"),
    )
    for row in rows:
        found, ratio = steps_s(row), ratios(row)
        steps = {name: duration(step_s) for name, step_s in found.items()}
        slices = [str(x["head_slices"]) for x in row.get("strategies", ()) if x["strategy"] == BEST]
        table.add_row(
            row["model"],
            str(row["num_devices"]),
            steps.get(BEST, ""),
            "".join(slices),
            gap(row, BEST) if BEST in found else "",
            *(
                cell
                for name in (WHOLE, ADAPTIS)
                for cell in (steps.get(name, ""), gap(row, name) if name in found else "")
            ),
            steps.get(BASE, ""),
            *(f"{ratio[x]:.3f}" if x in ratio else "" for x in ("interleaved", "best baseline")),
        )
    return table


def means(rows: Sequence[Json]) -> list[Json]:
    """Returns the geometric means of the ratios of each family, and of the uneven ones."""
    of: dict[str, list[Json]] = {}
    for row in rows:
        family = row["model"].split(":")[0]
        of.setdefault(family, []).append(row)
        if family in UNEVEN:
            of.setdefault("uneven families", []).append(row)
    found: list[Json] = []
    for name, each in of.items():
        found.append({"of": name})
        for other in "interleaved", "best baseline":
            given = [x[other] for x in map(ratios, each) if other in x]
            whole = [x[other] for x in (ratios(row, WHOLE) for row in each) if other in x]
            if given:
                found[-1] |= {
                    f"over {other}": round(geometric_mean(given), 4),
                    f"over {other}, head whole": round(geometric_mean(whole), 4),
                    f"rows with {other}": len(given),
                }
    return found


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
