import json
from collections import defaultdict
from itertools import pairwise

import pytest

from jaxptis.performance.timeline import TransferSpan
from jaxptis.pictures import save_trace
from jaxptis.plan import Task
from tests.pictures.timelines import even, jittered, uneven


def events_of(tmp_path, *args, **options):
    save_trace(tmp_path / "trace.json", *args, **options)
    return json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def slices_of(events):
    """Slices in the order of time, by process and thread."""
    threads = defaultdict(list)
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        threads[event["pid"], event["tid"]].append(event)
    return threads


def names_of(events, what):
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == what}


def test_a_slice_for_each_task_in_microseconds(tmp_path):
    plan, timeline = even("zb-v", 4, 8, transfer_s=1e-4)
    events = events_of(tmp_path, timeline, plan=plan)
    threads = slices_of(events)
    for pid, row in enumerate(timeline.spans, start=1):
        slices = threads[pid, pid]
        assert [each["name"] for each in slices] == [str(span.task) for span in row]
        for shown, (task, start_s, end_s) in zip(slices, row, strict=True):
            assert shown["ts"] == pytest.approx(start_s * 1e6, abs=1 / 16)
            assert shown["dur"] == pytest.approx((end_s - start_s) * 1e6, abs=1 / 8)
            assert shown["args"]["layers"] == ", ".join(plan.stages[task.stage].layers)
    processes = names_of(events, "process_name")
    assert processes == {(pid, pid): f"device {pid - 1}" for pid in range(1, 5)}
    names = [names_of(events, "thread_name")[pid, pid + 4 * n] for pid in (1, 4) for n in (0, 1)]
    assert names == ["compute", "transfers"] * 2


def test_numbers_are_as_perfetto_wants_them(tmp_path):
    """None is 0, a thread is of one process, and tasks have the thread with its number."""
    _, timeline = even("zb-v", 4, 8, transfer_s=1e-4)
    events = events_of(tmp_path, timeline, measured=jittered(timeline))
    process_of = {}
    for event in events:
        assert event["pid"] > 0
        assert event["tid"] > 0
        assert process_of.setdefault(event["tid"], event["pid"]) == event["pid"]
    assert len(process_of) >= 2 * 4 * 2
    computes = {e["tid"] for e in events if e["ph"] == "X" and "kind" in e["args"]}
    assert computes == {event["pid"] for event in events}


def overlaps(slices):
    """In whole nanoseconds, as Perfetto counts."""
    return any(
        round(after["ts"] * 1000) < round(before["ts"] * 1000) + round(before["dur"] * 1000)
        for before, after in pairwise(slices)
    )


def test_slices_that_touch_do_not_overlap_when_rounded(tmp_path):
    _, timeline = uneven(40, head_ms=10 / 3, transfer_s=1e-3 / 7)
    assert not any(map(overlaps, slices_of(events_of(tmp_path, timeline)).values()))


def test_slices_of_a_thread_do_not_overlap(tmp_path):
    """Perfetto nests slices of a thread: transfers that overlap need a thread each."""
    _, timeline = uneven(4)
    made_by = timeline.spans[0][0].task
    overlapping = tuple(
        TransferSpan(0, 1, made_by, 1, start_s, start_s + 2.5, 8)
        for start_s in (0.0, 1.0, 2.0, 3.0)
    )
    timeline = type(timeline)(timeline.spans, overlapping)
    threads = slices_of(events_of(tmp_path, timeline))
    assert not any(map(overlaps, threads.values()))
    # Three are under way at 2 s; the fourth starts when the first is done.
    assert [len(threads[1, 1 + 4 * lane]) for lane in (1, 2, 3)] == [2, 1, 1]
    assert (1, 1 + 4 * 4) not in threads


def test_arrows_lead_from_the_maker_to_the_reader(tmp_path):
    plan, timeline = even("zb-v", 4, 8, transfer_s=1e-4)
    events = events_of(tmp_path, timeline, plan=plan)
    threads = slices_of(events)

    def slice_at(event):
        (found,) = (
            each
            for each in threads[event["pid"], event["tid"]]
            if each["ts"] < event["ts"] < each["ts"] + each["dur"]
        )
        return Task.parse(found["name"])

    starts = {e["id"]: slice_at(e) for e in events if e["ph"] == "s"}
    ends = {e["id"]: slice_at(e) for e in events if e["ph"] == "f"}
    assert len(starts) == len(ends) == len(timeline.transfers) > 0
    for number, maker in starts.items():
        # A forward goes to the next stage, a gradient to the one before, on another device.
        step = 1 if maker.kind == "F" else -1
        assert ends[number] == Task(maker.stage + step, maker.kind, maker.microbatch)


def test_whole_backwards_have_arrows_too(tmp_path):
    _, timeline = uneven(4, transfer_s=1e-4)
    events = events_of(tmp_path, timeline)
    assert sum(event["ph"] == "f" for event in events) == 4 * 3 * 2


def test_memory_is_a_counter(tmp_path):
    _, timeline = uneven(4)
    events = events_of(tmp_path, timeline)
    for pid, curve in enumerate(timeline.memory, start=1):
        counted = [e for e in events if e["ph"] == "C" and e["pid"] == pid]
        assert [event["args"]["bytes"] for event in counted] == list(curve.num_bytes)
        times_us = [event["ts"] for event in counted]
        assert times_us == pytest.approx([1e6 * time_s for time_s in curve.times_s], abs=1 / 16)


def test_predicted_and_measured_are_two_groups(tmp_path):
    plan, timeline = uneven(4, transfer_s=1e-4)
    events = events_of(tmp_path, timeline, measured=jittered(timeline), plan=plan)
    names = names_of(events, "process_name")
    assert [names[pid, pid] for pid in range(1, 9)] == [
        f"{group} device {device}" for group in ("predicted", "measured") for device in range(4)
    ]
    arrows = [event["id"] for event in events if event["ph"] == "s"]
    assert len(set(arrows)) == len(arrows) == 2 * len(timeline.transfers)


def test_a_reader_that_is_not_there_has_no_arrow(tmp_path):
    """A timeline of a part of a step is drawn, too."""
    _, timeline = uneven(2, transfer_s=1e-4)
    first, second, *others = timeline.spans
    cut = type(timeline)((first, second[-1:], *others), timeline.transfers[:1])
    assert cut.transfers[0].target == 1
    assert not [event for event in events_of(tmp_path, cut) if event["ph"] in "sf"]
