"""From what the devices of all processes did to the timeline of a step."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite

from jaxptis.executor.instructions import Rows, Run
from jaxptis.executor.prove import in_one_order
from jaxptis.executor.record import Happening
from jaxptis.performance.timeline import Span, Timeline, TransferSpan
from jaxptis.plan import Task

Happenings = Mapping[tuple[int, int], Happening]
"""By device and position in its list."""


def timeline_of(rows: Rows, happenings: Happenings, num_bytes: Mapping[str, int]) -> Timeline:
    """Return the tasks, and the transfers between them, from the start of the first task.

    Args:
        rows: the instruction lists.
        happenings: when each of them was run, on one clock.
        num_bytes: of each buffer.
    """
    tasks = of_tasks(rows, happenings)
    begin_s = min(at.start_s for row in tasks for _, at in row)
    spans = tuple(
        tuple(Span(task, at.start_s - begin_s, at.end_s - begin_s) for task, at in row)
        for row in tasks
    )
    transfers = _transfers(rows, happenings, num_bytes, begin_s)
    return Timeline(spans, tuple(sorted(transfers, key=lambda each: each.start_s)))


def of_tasks(rows: Rows, happenings: Happenings) -> list[list[tuple[Task, Happening]]]:
    """Return the tasks of every device, and when each was run."""
    return [
        [
            (each.task, happenings[device, position])
            for position, each in enumerate(row)
            if isinstance(each, Run) and each.task is not None
        ]
        for device, row in enumerate(rows.rows)
    ]


def _transfers(
    rows: Rows, happenings: Happenings, num_bytes: Mapping[str, int], begin_s: float
) -> Iterator[TransferSpan]:
    """Yield what a task has made and another reads, of each transfer."""
    makers: dict[tuple[int, str], Task] = {}
    readers: dict[tuple[int, str], Task] = {}
    for device, row in enumerate(rows.rows):
        for each in row:
            if isinstance(each, Run) and each.task is not None:
                makers |= dict.fromkeys(((device, name) for name in each.writes), each.task)
                for name in each.reads:
                    readers.setdefault((device, name), each.task)
    for step in in_one_order(rows):
        if len(step.ends) == 1:
            continue
        at = {
            device: happenings[device, position]
            for (device, _), position in zip(step.ends, step.positions, strict=True)
        }
        start_s = max(each.start_s for each in at.values()) - begin_s
        for (source, sends), (target, _) in (step.ends, step.ends[::-1]):
            # What has arrived is there, whenever its sender gets to know.
            end_s = at[target].end_s - begin_s
            for name in sends.reads:
                made_by, reader = makers.get((source, name)), readers.get((target, name))
                if made_by is not None and reader is not None:
                    yield TransferSpan(
                        source=source,
                        target=target,
                        made_by=made_by,
                        reader=reader.stage,
                        start_s=start_s,
                        end_s=end_s,
                        num_bytes=num_bytes[name],
                    )


def on_one_clock(
    rows: Rows, processes: Sequence[int], happenings: Sequence[Happening]
) -> tuple[Happenings, float]:
    """Put what devices did on the clock of process 0, as far as causes come before effects.

    What arrives has been sent before: so each transfer bounds how far the clock of its receiver
    is ahead of its sender's, and one back the other way round. The middle is taken.

    Args:
        rows: the instruction lists.
        processes: that of each device.
        happenings: of all devices, each on the clock of its process.

    Returns:
        The happenings, and the seconds by which one may be wrong at most: infinite if a process
        only sends, or only receives.
    """
    found = {(each.device, each.position): each for each in happenings}
    ahead_s, error_s = _clocks(_bounds(rows, processes, found), max(processes) + 1)

    def shifted(each: Happening) -> Happening:
        by_s = ahead_s[processes[each.device]]
        return replace(each, start_s=each.start_s - by_s, end_s=each.end_s - by_s)

    return {key: shifted(each) for key, each in found.items()}, error_s


def _bounds(
    rows: Rows, processes: Sequence[int], happenings: Happenings
) -> dict[tuple[int, int], float]:
    """Return for pairs of processes by how much the second's clock is ahead at most."""
    bounds: dict[tuple[int, int], float] = {}
    for step in in_one_order(rows):
        if len({processes[device] for device, _ in step.ends}) == 1:
            continue
        at = dict(zip((device for device, _ in step.ends), step.positions, strict=True))
        for (source, sends), (target, _) in (step.ends, step.ends[::-1]):
            if sends.reads:
                pair = processes[source], processes[target]
                sent_s = happenings[source, at[source]].start_s
                ahead_s = happenings[target, at[target]].end_s - sent_s
                bounds[pair] = min(bounds.get(pair, inf), ahead_s)
    return bounds


def _clocks(bounds: Mapping[tuple[int, int], float], count: int) -> tuple[list[float], float]:
    """Return by how much each process's clock is ahead of the first's, and the largest error.

    Bounds add up along a chain of processes, so the tightest are shortest paths (Floyd 1962).
    """
    most = [
        [0.0 if p == q else bounds.get((p, q), inf) for q in range(count)] for p in range(count)
    ]
    for via, p, q in itertools.product(range(count), repeat=3):
        most[p][q] = min(most[p][q], most[p][via] + most[via][q])
    known = [[x for x in (most[0][p], -most[p][0]) if isfinite(x)] for p in range(count)]
    ahead_s = [sum(each) / len(each) if each else 0.0 for each in known]
    return ahead_s, max((most[0][p] + most[p][0]) / 2 for p in range(count))
