"""Layer times and plans that the authors of AdaPtis published; see tests/data/README.md."""

import csv
import json
import sys
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

from jaxptis.performance import Costs, LayerCost
from jaxptis.plan import StagePlan
from jaxptis.schedules import placement

DATA = Path(__file__).parent.parent / "tests" / "data"
TICK_S = 1e-5
"""Their simulator counts in whole ticks."""


@cache
def published_costs(model: str) -> Costs:
    """Return the costs of a model's layers, in whole ticks.

    What they call B is the input gradient; a whole backward is that and the weight gradient. The
    first stage of theirs makes an input gradient, too, so no embedding's takes nothing. Each layer
    between embedding and head saves a byte: memory is layers times microbatches.
    """
    profile = json.loads((DATA / "layer_profiles.json").read_text())[model]
    kinds = profile["layers"].split()
    layers = []
    for index, kind in enumerate(kinds):
        forward, input_grad, weight_grad = (
            round(milliseconds * 1e-3 / TICK_S) for milliseconds in profile["milliseconds"][kind]
        )
        layers.append(
            LayerCost(
                name=f"{index}/{kind}",
                forward_s=forward * TICK_S,
                backward_s=(input_grad + weight_grad) * TICK_S,
                input_grad_s=input_grad * TICK_S or sys.float_info.min,
                weight_grad_s=weight_grad * TICK_S,
                saved_bytes=int(0 < index < len(kinds) - 1),
            )
        )
    return Costs(tuple(layers))


@dataclass(frozen=True, kw_only=True)
class PublishedPlan:
    """A plan for a model, and how long its step is said to take.

    Attributes:
        model: whose costs it is for.
        strategy: the name that it has here; of what their planner made, "tuned" and, where it might
            use any number of stages, "tuned_irregular".
        num_devices: of the pipeline.
        num_microbatches: of the step.
        makespan_s: what the step takes.
        stages: the layers and devices; the embedding is in the first stage, the head in the last.
        in_flight: for each device the most layers times microbatches; empty if that is not said.
    """

    model: str
    strategy: str
    num_devices: int
    num_microbatches: int
    makespan_s: float
    stages: tuple[StagePlan, ...]
    in_flight: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.model} {self.num_devices}x{self.num_microbatches} {self.strategy}"


def published_plans(*strategies: str) -> list[PublishedPlan]:
    """Return the plans of these strategies; of one with options without them, too."""
    with (DATA / "published_plans.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["strategy"].split("(")[0] in strategies]
    return [_plan(row) for row in rows]


def _plan(row: dict[str, str]) -> PublishedPlan:
    strategy, num_devices = row["strategy"], int(row["devices"])
    names = [layer.name for layer in published_costs(row["model"]).layers]
    partition = _numbers(row["partition"])
    if not partition:
        num_stages = len(placement(strategy, num_devices=num_devices))
        few, more = divmod(len(names) - 2, num_stages)
        partition = [few + (stage < more) for stage in range(num_stages)]
    homes = _numbers(row["placement"]) or [s % num_devices for s in range(len(partition))]
    inner = list(accumulate(partition, initial=1))[1:-1]
    stages = (
        StagePlan(layers=tuple(names[start:end]), device=device)
        for (start, end), device in zip(pairwise([0, *inner, len(names)]), homes, strict=True)
    )
    return PublishedPlan(
        model=row["model"],
        strategy=strategy,
        num_devices=num_devices,
        num_microbatches=int(row["microbatches"]),
        makespan_s=float(row["makespan_ms"]) * 1e-3,
        stages=tuple(stages),
        in_flight=tuple(_numbers(row["in_flight"])),
    )


def _numbers(cell: str) -> list[int]:
    return [int(word) for word in cell.split()]
