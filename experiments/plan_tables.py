"""Plans models whose layer times the authors of AdaPtis published, beside what their planner found.

python -m experiments.plan_tables --seeds=0,1 --json_output=experiments/results/plan_tables.json
python -m experiments.plan_tables --stages_per_device=4 \
    --json_output=experiments/results/plan_tables_4P.json
python -m experiments.plan_tables --memory_of_1f1b --sizes=4x8,4x16,8x16,8x32,16x32,16x64 \
    --json_output=experiments/results/plan_tables_memory.json
python -m experiments.plan_tables --head_slices=1,2,3,4,6,8 --sizes=16x32 \
    --models=nemotron-nano-v2-9B,nemotron-h-4B,nemotron-h-8B,llama3-8B \
    --json_output=experiments/results/plan_tables_head_slices.json

Searches begin with what all baselines plan. Links are free, as theirs are. Ratios are another's
step over ours: above 1, ours is shorter. A gap is by what fraction ours is longer than what is
proven to be shorter than any.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean
from typing import Any

from absl import app, flags

from experiments.json_output import write_json
from experiments.published import PublishedPlan, published_costs, published_plans
from experiments.tried import attempt
from jaxptis.cluster import Cluster, DeviceSpec
from jaxptis.make_plan import BASELINES
from jaxptis.optimizer.certificate import certify
from jaxptis.optimizer.search.best import to_plan
from jaxptis.optimizer.search.polish import order_of
from jaxptis.optimizer.search.search import STAGES_PER_DEVICE, search
from jaxptis.optimizer.search.starts import starts_of
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import Costs, simulate

OTHERS = "tuned", "any_tuned", "1f1b"
"""Their planner's plan with as many stages on each device, the shorter of that and of one with any
number of stages, and 1F1B of a uniform partition."""

ALL_MODELS = sorted({each.model for each in published_plans("tuned")})
ALL_SIZES = sorted({f"{x.num_devices}x{x.num_microbatches}" for x in published_plans("tuned")})

_SECONDS = "forward_s", "backward_s", "input_grad_s", "weight_grad_s"
_NEVER_S = 1e6

SIZES = flags.DEFINE_list("sizes", ["4x8", "4x16", "8x16", "16x32"], "Devices x microbatches.")
MODELS = flags.DEFINE_list("models", ALL_MODELS, "By default all that were published.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Of the search; each makes a row.")
TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 10.0, "Of each search.", lower_bound=0.1)
STAGES = flags.DEFINE_integer(
    "stages_per_device", STAGES_PER_DEVICE, "The most of a plan, on average.", lower_bound=1
)
MEMORY_OF_1F1B = flags.DEFINE_bool(
    "memory_of_1f1b", False, "Limit devices to what 1F1B needs on its fullest, as published."
)
HEAD_SLICES = flags.DEFINE_list(
    "head_slices",
    ["1"],
    "Into how many slices a head may be cut: of k each takes 1/k of it, and 2 % more.",
)
flags.declare_key_flag("json_output")  # --help lists it


@flags.validator("sizes", f"give some of {', '.join(ALL_SIZES)}")
def _are_sizes(values: list[str]) -> bool:
    return bool(values) and set(values) <= set(ALL_SIZES)


@flags.validator("models", f"give some of {', '.join(ALL_MODELS)}")
def _are_models(values: list[str]) -> bool:
    return bool(values) and set(values) <= set(ALL_MODELS)


@flags.validator("seeds", "give whole numbers, with commas between")
def _are_seeds(values: list[str]) -> bool:
    return bool(values) and all(value.isdecimal() for value in values)


@flags.validator("head_slices", "give whole numbers of 1 or more, with commas between")
def _are_counts(values: list[str]) -> bool:
    return bool(values) and all(value.isdecimal() and int(value) > 0 for value in values)


def main(argv: Sequence[str]) -> None:
    """Prints a row for each size, model and seed, and the means of each size."""
    del argv
    rows: list[dict[str, Any]] = []
    for size in SIZES.value:
        devices, microbatches = map(int, size.split("x"))
        for model in MODELS.value:
            others = peers(model, devices, microbatches)
            for seed in map(int, SEEDS.value):
                rows.append({"size": size, "model": model, "seed": seed, **plan_row(others, seed)})
                print(*(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
                write(rows)
    print(*means(rows), sep="\n")


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows so far, so that they outlive an interruption."""
    settings = {
        flag.name: flag.value for flag in (TIME_LIMIT_S, STAGES, MEMORY_OF_1F1B, HEAD_SLICES)
    }
    write_json({"settings": settings, "means": means(rows), "rows": rows})


def peers(model: str, num_devices: int, num_microbatches: int) -> dict[str, PublishedPlan]:
    """Returns the published plans of OTHERS for a model and size."""

    def of(*strategies: str) -> list[PublishedPlan]:
        return [
            each
            for each in published_plans(*strategies)
            if (each.model, each.num_devices, each.num_microbatches)
            == (model, num_devices, num_microbatches)
        ]

    plans = (
        of("tuned")[0],
        min(of("tuned", "tuned_irregular"), key=lambda each: each.makespan_s),
        next(each for each in of("1f1b") if each.in_flight),
    )
    return dict(zip(OTHERS, plans, strict=True))


def plan_row(others: Mapping[str, PublishedPlan], seed: int) -> dict[str, Any]:
    """Returns what the search finds for the model and size of published plans, beside them.

    Seconds of the search are without those of the baselines that it begins with.
    """
    first = others["tuned"]
    num_devices, num_microbatches = first.num_devices, first.num_microbatches
    memory_bytes = max(others["1f1b"].in_flight) if MEMORY_OF_1F1B.value else None
    device = DeviceSpec(
        kind="published", flops_per_s=1.0, bytes_per_s=1.0, memory_bytes=memory_bytes
    )
    cluster = Cluster((device,) * num_devices)
    found, took_s = [], 0.0
    for count in map(int, HEAD_SLICES.value):
        costs = with_head_slices(published_costs(first.model), count)
        if MEMORY_OF_1F1B.value:
            costs = held_until_weights(costs)
        problem = Problem.of(costs, cluster, num_microbatches)
        bound_s = certify(costs, cluster, num_microbatches).bound_s
        tried = (attempt(name, costs, cluster, num_microbatches) for name in BASELINES)
        plans = [each.step.plan for each in tried if each.step]
        began_s = time.perf_counter()
        candidate = search(
            problem,
            time_limit_s=TIME_LIMIT_S.value,
            seed=seed,
            starts=starts_of(problem, plans),
            stages_per_device=STAGES.value,
            enough_s=bound_s,
        )[0].candidate
        took_s += time.perf_counter() - began_s
        names = [layer.name for layer in costs.layers]
        plan = to_plan(problem, order_of(problem, candidate), names)
        found.append((simulate(plan, costs).step_s, bound_s, len(plan.stages), count))
    step_s, bound_s, num_stages, count = min(found)
    return {
        "step_ms": round(step_s * 1e3, 2),
        **{f"over_{name}": round(each.makespan_s / step_s, 4) for name, each in others.items()},
        "gap": round(step_s / bound_s - 1, 5),
        "num_stages": num_stages,
        "head_slices": count,
        "search_s": round(took_s, 1),
    }


def with_head_slices(costs: Costs, count: int) -> Costs:
    """Returns costs whose last layer is cut, if it is."""
    if count == 1:
        return costs
    *layers, head = costs.layers
    part = 1 / count + 0.02
    seconds = {name: part * getattr(head, name) for name in _SECONDS}
    slices = (replace(head, name=f"{head.name}/{k}", **seconds) for k in range(count))
    return replace(costs, layers=(*layers, *slices))


def held_until_weights(costs: Costs) -> Costs:
    """Returns costs whose memory is as published: held until W, and never computed again."""
    layers = (replace(x, kept_bytes=x.saved_bytes, recompute_s=_NEVER_S) for x in costs.layers)
    return replace(costs, layers=tuple(layers))


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns geometric means of the ratios for each size, the least over tuned, and the gap.

    And, of several seeds, by what fraction a model's longest step is longer than its shortest.
    """
    sizes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sizes.setdefault(row["size"], []).append(row)
    found = []
    for size, of_size in sizes.items():
        mean: dict[str, Any] = {"size": size, "num_rows": len(of_size)}
        mean |= {
            f"mean_over_{name}": _mean(row[f"over_{name}"] for row in of_size) for name in OTHERS
        }
        mean["least_over_tuned"] = min(row["over_tuned"] for row in of_size)
        mean["largest_gap"] = max(row["gap"] for row in of_size)
        if len({row["seed"] for row in of_size}) > 1:
            mean["largest_spread"] = max(_spread(of_size, row["model"]) for row in of_size)
        found.append(mean)
    return found


def _spread(rows: Iterable[dict[str, Any]], model: str) -> float:
    steps_ms = [row["step_ms"] for row in rows if row["model"] == model]
    return round(max(steps_ms) / min(steps_ms) - 1, 5)


def _mean(ratios: Iterable[float]) -> float:
    return round(geometric_mean(ratios), 4)


if __name__ == "__main__":
    app.run(main)
