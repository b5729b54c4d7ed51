"""How long best takes with all that it starts from, in how much memory, and what more time gives.

python -m experiments.plan_times --json_output=experiments/results/plan_times.json

The layers are those of Nemotron-Nano-9B-v2, whose times the authors of AdaPtis published; those
between embedding and head are repeated until there are as many as asked for. Transfers take no
time. Each case is planned twice: as if no device waited for another to take what it sends, as in
the published tables, and with transfers that block both devices, as the executor runs them. Seconds
include the other strategies, with whose plans the search begins.
"""

import dataclasses
import resource
import time
from collections.abc import Sequence
from itertools import cycle, islice, product
from typing import Any

from absl import app, flags

from experiments.json_output import write_json
from experiments.published import published_costs
from experiments.tried import attempt
from jaxptis.cluster import Cluster, DeviceSpec
from jaxptis.make_plan import ADAPTIS, BASELINES
from jaxptis.optimizer import best_plan
from jaxptis.performance import Costs, simulate

DEVICE = DeviceSpec(kind="published", flops_per_s=1.0, bytes_per_s=1.0)

CASES = flags.DEFINE_list(
    "cases",
    ["4x8x58x3", "16x64x120x15", "64x256x128x10"],
    "Devices x microbatches x layers x time limit of the search, the largest last.",
)
LONGER_S = flags.DEFINE_list(
    "longer_s", ["10", "30", "0"], "Time limit of another search of each case; 0 for none."
)
flags.declare_key_flag("json_output")  # --help lists it


@flags.multi_flags_validator(
    ["cases", "longer_s"],
    "give each of --cases as devices x microbatches x layers x seconds, in whole numbers of 1 or "
    "more (of layers 2), and a whole number in --longer_s for each",
)
def _are_cases(values: dict[str, Any]) -> bool:
    cases = [case.split("x") for case in values["cases"]]
    numbers = [*(number for case in cases for number in case), *values["longer_s"]]
    if not all(map(str.isdecimal, numbers)) or any(len(case) != 4 for case in cases):
        return False
    least = all(min(map(int, case)) >= 1 and int(case[2]) >= 2 for case in cases)
    return least and len(cases) == len(values["longer_s"])


Json = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Prints two rows for each case; their memory is the most that the program has had so far."""
    del argv
    rows: list[Json] = []
    best_of(repeated(4), Cluster((DEVICE,) * 2), 2, 0.1, True)  # compiles what is compiled once
    cases = zip(CASES.value, map(float, LONGER_S.value), strict=True)
    for (case, longer_s), blocking in product(cases, (False, True)):
        num_devices, num_microbatches, num_layers, limit_s = map(int, case.split("x"))
        costs, cluster = repeated(num_layers), Cluster((DEVICE,) * num_devices)
        step_s, took_s = best_of(costs, cluster, num_microbatches, limit_s, blocking)
        row = {"case": case, "blocking": blocking, "step_ms": step_s * 1e3, "took_s": took_s}
        row["memory_bytes"] = memory()
        if longer_s:
            longest_s, took_s = best_of(costs, cluster, num_microbatches, longer_s, blocking)
            row |= {
                "longer_s": longer_s,
                "longer_step_ms": longest_s * 1e3,
                "longer_took_s": took_s,
            }
            row["over_longer"] = step_s / longest_s
        rows.append(row)
        print(*(f"{name}={value}" for name, value in row.items()), flush=True)
        write_json(rows)


def repeated(num_layers: int) -> Costs:
    """Returns so many layers: the embedding, those between it and the head in turn, the head."""
    first, *inner, last = published_costs("nemotron-nano-v2-9B").layers
    layers = first, *islice(cycle(inner), num_layers - 2), last
    return Costs(tuple(dataclasses.replace(x, name=str(k)) for k, x in enumerate(layers)))


def best_of(
    costs: Costs, cluster: Cluster, num_microbatches: int, time_limit_s: float, blocking: bool
) -> tuple[float, float]:
    """Returns the step of best, and how long it took, other strategies included."""
    began_s = time.perf_counter()
    tried = [attempt(x, costs, cluster, num_microbatches) for x in (*BASELINES, ADAPTIS)]
    others = [each.step.plan for each in tried if each.step]
    plan = best_plan(
        costs,
        cluster,
        num_microbatches,
        others=others,
        time_limit_s=time_limit_s,
        blocking=blocking,
    )
    took_s = time.perf_counter() - began_s
    return simulate(plan, costs, cluster, blocking=blocking).step_s, took_s


def memory() -> int:
    """Returns the most bytes that this program has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    app.run(main)
