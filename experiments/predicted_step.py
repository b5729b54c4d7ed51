"""A plan and what is predicted of its step: as tables for a person, and as figures for a file."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxptis.cluster import Cluster, DeviceSpec
from jaxptis.performance import Costs, Timeline, check_memory, simulate
from jaxptis.performance.memory import MemoryCurve
from jaxptis.pictures.bottleneck import find_bottleneck, say_memory
from jaxptis.pictures.facts import DeviceFacts, device_facts
from jaxptis.pictures.gantt import gantt
from jaxptis.pictures.words import duration, percent, size
from jaxptis.plan import Plan


@dataclasses.dataclass(frozen=True)
class PredictedStep:
    """A plan, and its step on a cluster; the step takes some time."""

    plan: Plan
    timeline: Timeline
    cluster: Cluster


def predicted(plan: Plan, costs: Costs, cluster: Cluster) -> PredictedStep:
    """Returns a plan with its step as the executor runs it, where transfers block both ends."""
    return PredictedStep(plan, simulate(plan, costs, cluster, blocking=True), cluster)


def why_it_does_not_fit(step: PredictedStep) -> str | None:
    """Returns what a device lacks of memory, and what to change; None if all have enough."""
    try:
        check_memory(step.timeline, step.cluster)
    except ValueError as error:
        return str(error)
    return None


def report(step: PredictedStep, console: Console) -> None:
    """Prints stages, devices, the chart of the step, and who holds it up."""
    for table in stages_of(step.plan), devices_of(step):
        console.print()
        console.print(table)
    console.print()
    console.print(gantt(step.timeline, width=console.width))
    for sentence in find_bottleneck(step.timeline, step.plan).sentence, say_memory(step.timeline):
        console.print(Text(sentence))


def stages_of(plan: Plan) -> Table:
    """Returns a line a stage: where it is, and of which layers."""
    table = new_table("stage", "device", "layers", "first", "last", "recompute")
    for index, stage in enumerate(plan.stages):
        count = str(len(stage.layers))
        ends = Text(stage.layers[0]), Text(stage.layers[-1])
        table.add_row(str(index), str(stage.device), count, *ends, stage.recompute)
    return table


def devices_of(step: PredictedStep) -> Table:
    """Returns a line a device: what it does with the step, and the memory that it needs."""
    table = new_table(
        *("device", "busy", "bubble", "warm-up", "steady", "cool-down", "exposed"),
        *("peak memory", "most of it"),
    )
    table.caption = "exposed: transfers while it computes nothing, a part of the bubble"
    table.caption_justify = "left"
    for facts, memory, spec in devices(step):
        bubble = facts.bubble
        seconds = bubble.warm_up_s, bubble.steady_s, bubble.cool_down_s, bubble.exposed_s
        table.add_row(
            str(facts.device),
            duration(facts.busy_s),
            percent(1 - facts.share),
            *map(duration, seconds),
            *memory_cells(memory, spec.memory_bytes),
        )
    return table


def devices(step: PredictedStep) -> Iterator[tuple[DeviceFacts, MemoryCurve, DeviceSpec]]:
    """Yields of each device what it does, what it holds and what it is."""
    timeline = step.timeline
    return zip(device_facts(timeline), timeline.memory, step.cluster.devices, strict=False)


def memory_cells(memory: MemoryCurve, limit_bytes: int | None) -> tuple[str, str]:
    """Returns the peak, beside what there is, and its largest part."""
    part, part_bytes = max(memory.peak_parts.items(), key=lambda each: each[1])
    limit = "" if limit_bytes is None else f" of {size(limit_bytes)}"
    return f"{size(memory.peak_bytes)}{limit}", f"{part} {size(part_bytes)}" if part_bytes else ""


def new_table(*columns: str) -> Table:
    """Returns a table without lines, whose long names go on below."""
    table = Table(box=None)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def to_json(step: PredictedStep) -> dict[str, Any]:
    """Returns the plan and all figures; times in seconds, sizes in bytes."""
    timeline = step.timeline
    bottleneck = find_bottleneck(timeline, step.plan)
    return {
        "plan": step.plan.text(),
        "step_s": timeline.step_s,
        "bottleneck": dataclasses.asdict(bottleneck),
        "devices": [
            {
                "stages": facts.stages,
                "busy_s": facts.busy_s,
                "bubble": 1 - facts.share,
                **dataclasses.asdict(facts.bubble),
                "peak_bytes": memory.peak_bytes,
                "peak_s": memory.peak_s,
                "peak_parts": dict(memory.peak_parts),
                "memory_bytes": spec.memory_bytes,
            }
            for facts, memory, spec in devices(step)
        ],
    }
