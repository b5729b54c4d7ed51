"""What it is worth to plan for devices of the speeds that they have.

python -m experiments.uneven_devices --time_limit_s=2 \
    --json_output=experiments/results/uneven_devices.json

All strategies plan models whose layer times the authors of AdaPtis published, as if devices were
equal; best, `adaptis` and `mist` also for the speeds that they have. Links are free. Ratios are the
step of another plan, the shortest of its kind, over that of best for devices as they are.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from math import inf
from statistics import geometric_mean
from typing import Any

from absl import app, flags

from experiments.json_output import this_run, write_json
from experiments.published import published_costs, published_plans
from experiments.tried import attempt
from jaxptis.cluster import Cluster, DeviceSpec
from jaxptis.make_plan import ADAPTIS, BASELINES, MIST
from jaxptis.optimizer import best_plan
from jaxptis.performance import Costs, simulate
from jaxptis.plan import Plan

PUBLISHED = sorted({plan.model for plan in published_plans("tuned")})
DEVICE = DeviceSpec(kind="published", flops_per_s=1.0, bytes_per_s=1.0)

MODELS = flags.DEFINE_list("models", None, "By default all that were published.")
SPEEDS = flags.DEFINE_list("speeds", ["1", "1", "0.5", "0.5"], "Of the devices.")
NUM_MICROBATCHES = flags.DEFINE_integer("num_microbatches", 8, "Of a step.", lower_bound=1)
TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 10.0, "Of each search.", lower_bound=0.1)
flags.declare_key_flag("json_output")  # --help lists it


@flags.validator("models", f"give some of {', '.join(PUBLISHED)}")
def _are_published(values: list[str] | None) -> bool:
    return set(values or ()) <= set(PUBLISHED)


@flags.validator("speeds", "give one number above 0 for each device, up to 32, with commas between")
def _are_speeds(values: list[str]) -> bool:
    try:
        return all(0 < float(value) < inf for value in values) and 0 < len(values) <= 32
    except ValueError:
        return False


Json = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Prints a row a model, then the geometric means."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    settings = {x.name: x.value for x in (SPEEDS, NUM_MICROBATCHES, TIME_LIMIT_S)}
    rows: list[Json] = []
    for model in MODELS.value or PUBLISHED:
        rows.append({"model": model, **ratios(published_costs(model))})
        print(*(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
        write_json({**this_run("uneven_devices", settings), "rows": rows})
    for name in [name for name in rows[0] if name.startswith("over_")]:
        of_all = [row[name] for row in rows]
        print(f"{name} mean {geometric_mean(of_all):.3f}, least {min(of_all):.3f}")


def ratios(costs: Costs) -> Json:
    """Returns the step of best in milliseconds, and those of others over it."""
    speeds = [float(speed) for speed in SPEEDS.value]
    equal = Cluster((DEVICE,) * len(speeds))
    here = Cluster(tuple(dataclasses.replace(DEVICE, speed=speed) for speed in speeds))

    def step_s(plan: Plan) -> float:
        return simulate(plan, costs, here, blocking=True).step_s

    def shortest_s(strategies: Iterable[str], cluster: Cluster) -> float:
        tried = (attempt(x, costs, cluster, NUM_MICROBATCHES.value) for x in strategies)
        return min(step_s(each.step.plan) for each in tried if each.step)

    def best_s(cluster: Cluster) -> float:
        limit_s = TIME_LIMIT_S.value
        return step_s(best_plan(costs, cluster, NUM_MICROBATCHES.value, time_limit_s=limit_s))

    found_s = best_s(here)
    others_s = {
        "over_all_for_equal": shortest_s((*BASELINES, ADAPTIS), equal),
        "over_best_for_equal": best_s(equal),
        "over_adaptis_and_mist": shortest_s((ADAPTIS, MIST), here),
    }
    return {
        "step_ms": round(found_s * 1e3, 2),
        **{name: round(seconds / found_s, 4) for name, seconds in others_s.items()},
    }


if __name__ == "__main__":
    app.run(main)
