"""A timeline as a trace in Chrome's JSON form, for ui.perfetto.dev or chrome://tracing.

The form is that of the document "Trace Event Format" of the Chromium project: times are in
microseconds, "X" is a slice, "s" and "f" are the ends of an arrow between slices, "C" is a counter
and "M" names a process or a thread.
"""

import json
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from jaxptis.performance.timeline import Timeline, TransferSpan
from jaxptis.pictures.colors import KIND_WORDS
from jaxptis.pictures.together import named
from jaxptis.plan import Plan

_COMPUTE, _TRANSFERS = 0, 1  # threads of a process; further ones for transfers that overlap

Event = dict[str, Any]


def save_trace(
    path: str | PathLike[str],
    timeline: Timeline,
    *,
    measured: Timeline | None = None,
    plan: Plan | None = None,
    title: str = "",
) -> None:
    """Write a process for each device, with its tasks, its transfers and its memory.

    Args:
        path: of the file.
        timeline: the predicted one, or any.
        measured: what really ran; its processes follow those of the other.
        plan: names the layers.
        title: stands among the information about the trace.

    Raises:
        ValueError: the timelines and the plan are not of one pipeline.
    """
    events: list[Event] = []
    for group, (name, one) in enumerate(named(timeline, measured, plan).items()):
        events += _events(one, plan, f"{name} ".lstrip(), first=group * len(one.spans))
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title}}
    Path(path).write_text(json.dumps(trace, separators=(",", ":")), encoding="utf-8")


def _events(timeline: Timeline, plan: Plan | None, group: str, first: int) -> Iterator[Event]:
    """Give the events of a timeline, whose first device is process `first`."""
    lanes = {device: _lanes(timeline, device) for device in range(len(timeline.spans))}
    for device, row in enumerate(timeline.spans):
        pid = first + device
        yield from _names(pid, f"{group}device {device}", len(lanes[device]))
        for task, start_s, end_s in row:
            words: Event = {"kind": KIND_WORDS[task.kind], "stage": task.stage}
            words["microbatch"] = task.microbatch
            if plan is not None:
                words["layers"] = ", ".join(plan.stages[task.stage].layers)
            yield _slice(pid, _COMPUTE, str(task), start_s, end_s, words)
        for lane, transfers in enumerate(lanes[device]):
            for transfer in transfers:
                yield _transfer(pid, _TRANSFERS + lane, transfer, device)
        if timeline.memory:
            curve = timeline.memory[device]
            for time_s, num_bytes in zip(curve.times_s, curve.num_bytes, strict=True):
                yield {"ph": "C", "name": "memory", "pid": pid, "ts": time_s * 1e6} | {
                    "args": {"bytes": num_bytes}
                }
    yield from _arrows(timeline, first)


def _names(pid: int, name: str, num_lanes: int) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    more = ("transfers", *(f"transfers {lane + 1}" for lane in range(1, num_lanes)))
    for tid, thread in enumerate(("compute", *more)):
        for what, value in ("name", thread), ("sort_index", tid):
            event: Event = {"ph": "M", "name": f"thread_{what}", "pid": pid, "tid": tid}
            yield event | {"args": {what: value}}


def _slice(
    pid: int, tid: int, name: str, start_s: float, end_s: float, words: dict[str, Any]
) -> Event:
    event: Event = {"ph": "X", "name": name, "pid": pid, "tid": tid, "args": words}
    return event | {"ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6}


def _transfer(pid: int, tid: int, transfer: TransferSpan, device: int) -> Event:
    to_or_from = (
        f"to device {transfer.target}"
        if transfer.source == device
        else f"from device {transfer.source}"
    )
    words = {"reader": f"stage {transfer.reader}", "bytes": transfer.num_bytes}
    name = f"{transfer.made_by} {to_or_from}"
    return _slice(pid, tid, name, transfer.start_s, transfer.end_s, words)


def _lanes(timeline: Timeline, device: int) -> list[list[TransferSpan]]:
    """Lay the transfers of a device out so that none overlaps another: slices of a thread nest."""
    lanes: list[list[TransferSpan]] = [[]]
    for transfer in sorted(timeline.transfers, key=lambda each: each.start_s):
        if device in (transfer.source, transfer.target):
            free = (lane for lane in lanes if not lane or lane[-1].end_s <= transfer.start_s)
            lane = next(free, None)
            if lane is None:
                lanes.append(lane := [])
            lane.append(transfer)
    return lanes


def _arrows(timeline: Timeline, first: int) -> Iterator[Event]:
    """Give an arrow for each transfer, from the task that made what is sent to its reader.

    An end of an arrow belongs to the slice of the thread that is open then: so it is put in its
    middle.
    """
    middle_us: dict[tuple[int, str, int], float] = {}
    for row in timeline.spans:
        for task, start_s, end_s in row:
            middle_us[task.stage, task.kind, task.microbatch] = (start_s + end_s) / 2 * 1e6
    for number, transfer in enumerate(timeline.transfers):
        task = transfer.made_by
        readers = _readers(transfer)
        reader = next((each for each in readers if each in middle_us), None)
        if reader is None:
            continue
        arrow: Event = {"name": "transfer", "cat": "transfer", "id": first * 10**6 + number}
        start_us = middle_us[task.stage, task.kind, task.microbatch]
        yield arrow | {"ph": "s", "pid": first + transfer.source, "tid": _COMPUTE, "ts": start_us}
        end: Event = {"ph": "f", "bp": "e", "pid": first + transfer.target, "tid": _COMPUTE}
        yield arrow | end | {"ts": middle_us[reader]}


def _readers(transfer: TransferSpan) -> Sequence[tuple[int, str, int]]:
    """Return the tasks that may read what is sent: a forward, or either form of a backward."""
    kinds = "F" if transfer.made_by.kind == "F" else "BI"
    return [(transfer.reader, kind, transfer.made_by.microbatch) for kind in kinds]
