"""A timeline as a trace in Chrome's JSON form, for ui.perfetto.dev or chrome://tracing.

The form is that of the document "Trace Event Format" of the Chromium project: times are in
microseconds, "X" is a slice, "s" and "f" are the ends of an arrow between slices, "C" is a counter
and "M" names a process or a thread.

Perfetto keeps process and thread 0 for the idle task, names threads by their number alone, and
gives counters to the thread with the number of its process. So numbers start at 1, no two threads
share one, and that of a device's tasks has the number of the process.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from jaxptis.performance.memory import MemoryCurve
from jaxptis.performance.timeline import Span, Timeline, TransferSpan
from jaxptis.pictures.colors import KIND_WORDS
from jaxptis.pictures.together import named
from jaxptis.plan import Plan, Task

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
        ValueError: the step takes no time, or the timelines and the plan are not of one pipeline.
    """
    given = named(timeline, measured, plan)
    num_devices = len(timeline.spans)
    events: list[Event] = []
    for group, (name, one) in enumerate(given.items()):
        processes = [
            _Process(
                device=device,
                name=f"{name} device {device}".lstrip(),
                pid=1 + group * num_devices + device,
                num_processes=len(given) * num_devices,
            )
            for device in range(num_devices)
        ]
        events += _events(one, plan, processes)
        events += _arrows(one, processes, first=len(timeline.transfers) * group)
    trace = {"traceEvents": events, "otherData": {"title": title}}
    Path(path).write_text(json.dumps(trace, separators=(",", ":")), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class _Process:
    device: int
    name: str
    pid: int
    num_processes: int

    def tid(self, lane: int) -> int:
        """Return the number of a thread: lane 0 has the tasks, others transfers."""
        return self.pid + lane * self.num_processes

    def event(self, phase: str, name: str, lane: int = 0, **more: Any) -> Event:
        return {"ph": phase, "name": name, "pid": self.pid, "tid": self.tid(lane), **more}

    def slice(
        self, name: str, lane: int, start_s: float, end_s: float, words: dict[str, Any]
    ) -> Event:
        start_us, end_us = _microseconds(start_s), _microseconds(end_s)
        return self.event("X", name, lane, ts=start_us, dur=end_us - start_us, args=words)


def _microseconds(seconds: float) -> float:
    """Round to an eighth, which floats hold exactly: slices that touch do so for a reader, too."""
    return round(seconds * 8e6) / 8


def _events(timeline: Timeline, plan: Plan | None, processes: list[_Process]) -> Iterator[Event]:
    lanes = _lanes(timeline)
    for process, row in zip(processes, timeline.spans, strict=True):
        yield from _names(process, len(lanes[process.device]))
        for span in row:
            yield _task(process, span, plan)
        for lane, transfers in enumerate(lanes[process.device], start=1):
            for transfer in transfers:
                yield _transfer(process, lane, transfer)
    for process, curve in zip(processes, timeline.memory, strict=False):
        yield from _counter(process, curve)


def _names(process: _Process, num_lanes: int) -> Iterator[Event]:
    yield process.event("M", "process_name", args={"name": process.name})
    yield process.event("M", "process_sort_index", args={"sort_index": process.pid})
    more = ("transfers", *(f"transfers {lane + 1}" for lane in range(1, num_lanes)))
    for lane, name in enumerate(("compute", *more)):
        yield process.event("M", "thread_name", lane, args={"name": name})
        yield process.event("M", "thread_sort_index", lane, args={"sort_index": lane})


def _task(process: _Process, span: Span, plan: Plan | None) -> Event:
    task = span.task
    words = {
        "kind": KIND_WORDS[task.kind],
        "stage": task.stage,
        "microbatch": task.microbatch,
    }
    layers = {"layers": ", ".join(plan.stages[task.stage].layers)} if plan else {}
    return process.slice(str(task), 0, span.start_s, span.end_s, words | layers)


def _transfer(process: _Process, lane: int, transfer: TransferSpan) -> Event:
    if transfer.source == process.device:
        name = f"{transfer.made_by} to device {transfer.target}"
    else:
        name = f"{transfer.made_by} from device {transfer.source}"
    words = {"reader": f"stage {transfer.reader}", "bytes": transfer.num_bytes}
    return process.slice(name, lane, transfer.start_s, transfer.end_s, words)


def _counter(process: _Process, curve: MemoryCurve) -> Iterator[Event]:
    for time_s, num_bytes in zip(curve.times_s, curve.num_bytes, strict=True):
        yield process.event("C", "memory", ts=_microseconds(time_s), args={"bytes": num_bytes})


def _lanes(timeline: Timeline) -> dict[int, list[list[TransferSpan]]]:
    """Lay out the transfers of each device so that none overlaps another: slices must nest."""
    lanes: defaultdict[int, list[list[TransferSpan]]] = defaultdict(lambda: [[]])
    for transfer in sorted(timeline.transfers, key=lambda each: each.start_s):
        for device in (transfer.source, transfer.target):
            own = lanes[device]
            free = (lane for lane in own if not lane or lane[-1].end_s <= transfer.start_s)
            lane = next(free, None)
            if lane is None:
                own.append(lane := [])
            lane.append(transfer)
    return lanes


def _arrows(timeline: Timeline, processes: list[_Process], first: int) -> Iterator[Event]:
    """Give an arrow for each transfer, from the task that made what is sent to its reader.

    The ends of an arrow belong to the slices that are open then, so they lie in their middle.
    """
    middle_us = {
        span.task: (_microseconds(span.start_s) + _microseconds(span.end_s)) / 2
        for row in timeline.spans
        for span in row
    }
    for number, transfer in enumerate(timeline.transfers, start=first):
        reader = next((each for each in _readers(transfer) if each in middle_us), None)
        if reader is not None:
            source, target = processes[transfer.source], processes[transfer.target]
            arrow: Event = {"cat": "transfer", "id": number}
            yield source.event("s", "transfer", ts=middle_us[transfer.made_by], **arrow)
            yield target.event("f", "transfer", ts=middle_us[reader], bp="e", **arrow)


def _readers(transfer: TransferSpan) -> tuple[Task, ...]:
    """Return the tasks that may read what is sent: a forward, or either form of a backward."""
    kinds = "F" if transfer.made_by.kind == "F" else "BI"
    return tuple(Task(transfer.reader, kind, transfer.made_by.microbatch) for kind in kinds)
