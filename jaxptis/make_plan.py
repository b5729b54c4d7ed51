"""From a strategy to a plan: named schedules, schedules in CSV files, plans and plan files."""

import contextlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise, zip_longest
from os import PathLike
from pathlib import Path

from jaxptis.cluster import Cluster
from jaxptis.optimizer import adaptis, balance, best_plan, check_fills_devices, mist, uniform
from jaxptis.options import Strategy
from jaxptis.performance import Costs, LayerCost
from jaxptis.plan import Plan, Schedule, StagePlan, schedule_from_csv
from jaxptis.plan.csv import placement_of
from jaxptis.schedules import (
    FAMILIES,
    PARTITIONS,
    StageCosts,
    check_fills_stages,
    names_family,
    partition,
    placement,
    schedule,
)

BEST, ADAPTIS, MIST = PLANNERS = "best", "adaptis", "mist"
"""The strategies that choose more than an order: BEST searches, the others are published."""


_DEEPER = [f"interleaved(v={v}, " for v in (3, 4)] + [f"hanayo(waves={n}, " for n in (2, 3)]
BASELINES = (
    *(
        f"{name}partition={how})"
        for name in (*(f"{family}(" for family in FAMILIES), *_DEEPER)
        for how in PARTITIONS
    ),
    MIST,
)
"""All schedules, some with more stages on each device than by default, with either partition; and
MIST."""


def make_plan(costs: Costs, strategy: Strategy, *, cluster: Cluster, num_microbatches: int) -> Plan:
    """Make or check the plan for the layers that the costs are of.

    Raises:
      ValueError: the strategy is not known, or the plan does not fit the model or the devices.
    """
    if strategy == BEST:
        others = _other_plans(costs, cluster, num_microbatches)
        return best_plan(costs, cluster, num_microbatches, others=others)
    if strategy == ADAPTIS:
        return adaptis(costs, cluster, num_microbatches, blocking=True).plan
    if strategy == MIST:
        return mist(costs, cluster, num_microbatches)
    return _fixed_plan(costs, strategy, len(cluster.devices), num_microbatches)


def check_strategy(
    strategy: Strategy, layers: Sequence[str], *, num_devices: int, num_microbatches: int
) -> None:
    """Check a strategy before it is known what the layers cost, which may take long to find out.

    Raises:
      ValueError: `make_plan` would raise it whatever they cost.
    """
    if strategy in (ADAPTIS, MIST):
        check_fills_devices(len(layers), num_devices)
    if strategy in PLANNERS:
        return
    any_costs = (
        LayerCost(name=name, forward_s=1.0, backward_s=2.0, input_grad_s=1.0, weight_grad_s=1.0)
        for name in layers
    )
    _fixed_plan(Costs(tuple(any_costs)), strategy, num_devices, num_microbatches)


def _fixed_plan(costs: Costs, strategy: Strategy, num_devices: int, num_microbatches: int) -> Plan:
    """Return the plan of a named schedule, a schedule in a CSV file, a plan, or a plan file."""
    layers = tuple(cost.name for cost in costs.layers)
    if isinstance(strategy, str) and names_family(strategy):
        return _named_plan(strategy, layers, costs, num_devices, num_microbatches)
    if not isinstance(strategy, Plan) and str(strategy).endswith(".csv"):
        plan = _csv_plan(strategy, layers, costs)
    else:
        plan = strategy if isinstance(strategy, Plan) else _load_plan(strategy)
    _check_plan(plan, layers, num_devices=num_devices, num_microbatches=num_microbatches)
    return plan


def _other_plans(costs: Costs, cluster: Cluster, num_microbatches: int) -> Iterator[Plan]:
    """Yield the plans of all other strategies that allow these numbers."""
    for strategy in (*BASELINES, ADAPTIS):
        with contextlib.suppress(ValueError):
            yield make_plan(costs, strategy, cluster=cluster, num_microbatches=num_microbatches)


def _named_plan(
    strategy: str, layers: Sequence[str], costs: Costs, num_devices: int, num_microbatches: int
) -> Plan:
    check_fills_stages(strategy, num_devices=num_devices, num_layers=len(layers))
    devices = placement(strategy, num_devices=num_devices)
    is_uniform = partition(strategy) == "uniform"
    edges = uniform(len(layers), len(devices)) if is_uniform else _balance(costs, len(devices))
    ranges = [range(start, end) for start, end in pairwise(edges)]
    rows = schedule(
        strategy,
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        costs=StageCosts(
            forward_s=tuple(costs.task_s(each, "F") for each in ranges),
            backward_s=tuple(costs.task_s(each, "B") for each in ranges),
            input_grad_s=tuple(costs.task_s(each, "I") for each in ranges),
            weight_grad_s=tuple(costs.task_s(each, "W") for each in ranges),
        ),
    )
    return _assemble(layers, edges, devices, rows)


def _csv_plan(path: str | PathLike[str], layers: Sequence[str], costs: Costs) -> Plan:
    """Place stages where the rows have them, and balance the layers over them."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"strategy {path!r} cannot be read ({error}); give the path of a text file in UTF-8"
        ) from error
    rows = schedule_from_csv(text, source=str(path))
    try:
        devices = placement_of(rows)
        if len(layers) < len(devices):
            raise ValueError(
                f"{len(layers)} layers cannot fill its {len(devices)} stages; use a schedule of "
                f"{len(layers)} stages or fewer"
            )
        return _assemble(layers, _balance(costs, len(devices)), devices, rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _balance(costs: Costs, num_stages: int) -> tuple[int, ...]:
    return balance([cost.forward_s + cost.backward_s for cost in costs.layers], num_stages)


def _assemble(
    layers: Sequence[str], edges: Sequence[int], devices: Sequence[int], rows: Schedule
) -> Plan:
    stages = (
        StagePlan(layers=tuple(layers[start:end]), device=device)
        for (start, end), device in zip(pairwise(edges), devices, strict=True)
    )
    return Plan(stages=tuple(stages), schedule=rows)


def _load_plan(strategy: str | PathLike[str]) -> Plan:
    try:
        return Plan.load(strategy)
    except (OSError, TypeError, UnicodeDecodeError) as error:
        known = *FAMILIES, *PLANNERS
        close = get_close_matches(str(strategy).partition("(")[0], known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"strategy {strategy!r} is neither a schedule ({', '.join(known)}) nor the path of "
            f"a plan file that can be read ({error}); {hint}change it, or write the file with "
            "plan.save(path)"
        ) from error


def _check_plan(
    plan: Plan, layers: Sequence[str], *, num_devices: int, num_microbatches: int
) -> None:
    for index, (planned, found) in enumerate(zip_longest(plan.layers, layers)):
        if planned != found:
            raise ValueError(
                f"the plan is for another model: its layer {index} is {planned!r}, the model's is "
                f"{found!r} (the plan has {len(plan.layers)} layers, the model {len(layers)}); "
                "use a plan of this model"
            )
    if plan.num_microbatches != num_microbatches:
        raise ValueError(
            f"the plan has {plan.num_microbatches} microbatches, but num_microbatches is "
            f"{num_microbatches}; make them equal"
        )
    if plan.num_devices > num_devices:
        raise ValueError(
            f"the plan needs {plan.num_devices} devices, but {num_devices} are given; "
            "pass more devices or use another plan"
        )
    if all(task.kind == "F" for row in plan.schedule for task in row):
        raise ValueError(
            "the plan has forwards only; give every stage and microbatch a backward, too: "
            "B, or I and W"
        )
