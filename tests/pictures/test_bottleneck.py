from dataclasses import replace

import pytest

from jaxptis.performance import Span, Timeline
from jaxptis.performance.memory import MemoryCurve
from jaxptis.pictures import find_bottleneck, say_memory
from jaxptis.plan import Plan, StagePlan, Task
from tests.pictures.timelines import GIB, costs_of, even, timeline_of, uneven


def row(*tasks):
    """Spans of (task, start, end) in seconds."""
    return tuple(Span(Task.parse(name), start_s, end_s) for name, start_s, end_s in tasks)


def test_a_heavy_stage_is_the_bottleneck():
    """1F1B behind a heavy last stage of f: 5.7 ms till it starts, then 8 (f + 2f) without a pause.

    Till then three forwards (1.1, 2 and 2 ms) and as many transfers of 0.2 ms; after it their
    backwards, twice as long, and transfers. The others compute 8 times 3.3, 6 and 6 ms.
    """
    plan, timeline = uneven(8, head_ms=3.0, transfer_s=0.2e-3)
    step_ms = 5.7 + 8 * 3 * 3.1 + 2 * 5.1 + 0.6
    assert timeline.step_s * 1e3 == pytest.approx(step_ms)
    most, others = 74.4 / step_ms, 8 * (3.3 + 6 + 6) / 3 / step_ms
    found = find_bottleneck(timeline, plan)
    assert found.devices == (3,)
    assert found.sentence == (
        f"Device 3 computes {round(most * 100)} % of the step, the others {round(others * 100)} % "
        "on average and wait for it: its only stage, 3, has norm and head."
    )
    assert find_bottleneck(timeline).sentence.endswith("wait for it: all of it is stage 3.")


@pytest.mark.parametrize(("P", "M"), [(2, 2), (4, 4), (4, 12)])
def test_like_devices_that_idle(P, M):
    """GPipe of like stages: a device idles (P - 1)/(M + P - 1), half of it at the ends."""
    plan, timeline = even("gpipe", P, M)
    idle = (P - 1) / (M + P - 1)
    busy, half = round(100 * (1 - idle)), round(100 * idle / 2)
    found = find_bottleneck(timeline, plan)
    assert found.devices == ()
    assert found.sentence == (
        f"No device holds up the others: each computes {busy} % of the step; on average "
        f"warm-up and cool-down take {half} % and waits in between take {half} %."
    )


def test_the_heaviest_stage_of_several_is_named():
    """Device 1 has stages of 1 and 3 s, 80 % of 5 s; device 0 has 1 s, 20 %."""
    timeline = Timeline((row(("0F0", 0, 1)), row(("1F0", 1, 2), ("2F0", 2, 5))))
    stages = [StagePlan(layers=(name,), device=d) for name, d in (("a", 0), ("b", 1), ("c", 1))]
    schedule = tuple(tuple(span.task for span in each) for each in timeline.spans)
    found = find_bottleneck(timeline, Plan(stages=tuple(stages), schedule=schedule))
    assert found.devices == (1,)
    assert found.sentence == (
        "Device 1 computes 80 % of the step, the other 20 % and waits for it: its stage 2 (c) "
        "takes 75 % of its time."
    )


@pytest.mark.parametrize(
    ("busy", "like"),
    [
        ("1001", ", as does device 3, the others 50 % on average and wait for them: "),
        ("1011", ", as do devices 2 and 3, the other 50 % and waits for them: "),
        ("011010", ", as do devices 2 and 4, the others 50 % on average and wait for them: "),
        ("0111100", ", as do devices 2 to 4, the others 50 % on average and wait for them: "),
    ],
)
def test_devices_that_are_as_busy_are_named(busy, like):
    """Each computes either all of two seconds or half."""
    rows = [row((f"{d}F0", 0, 1 + int(long))) for d, long in enumerate(busy)]
    found = find_bottleneck(Timeline(tuple(rows)))
    devices = tuple(d for d, long in enumerate(busy) if long == "1")
    assert found.devices == devices
    stage = devices[0]
    computes = f"Device {stage} computes 100 % of the step"
    assert found.sentence == f"{computes}{like}all of it is stage {stage}."


def test_more_work_is_not_all_where_the_busiest_idles_too():
    """One after the other for 3, 3 and 4 s: the busiest is 7 % above the mean, and idles 60 %."""
    timeline = Timeline((row(("0F0", 0, 3)), row(("1F0", 3, 6)), row(("2F0", 6, 10))))
    found = find_bottleneck(timeline)
    assert found.devices == (2,)
    assert found.sentence == (
        "Device 2 has the most work, 40 % of the step (the others 30 % on average): all of it is "
        "stage 2. But it idles: warm-up and cool-down take 60 %."
    )


def test_exposed_transfers_are_named():
    """Two like devices, the second a second after the first, in which a transfer runs."""
    plan = Plan(
        stages=tuple(StagePlan(layers=(name,), device=d) for d, name in enumerate("ab")),
        schedule=((Task(0, "F", 0),), (Task(1, "F", 0),)),
    )
    timeline = timeline_of(plan, costs_of(plan, {"a": 2000.0, "b": 2000.0}), 1.0)
    assert find_bottleneck(timeline).sentence == (
        "No device holds up the others: each computes 40 % of the step; on average warm-up and "
        "cool-down take 60 %; transfers are exposed for 20 %."
    )


def test_a_single_device():
    timeline = Timeline((row(("0F0", 0, 3), ("0B0", 4, 5)),))
    found = find_bottleneck(timeline)
    assert (found.devices, found.sentence) == ((), "The only device computes 80 % of the step.")


def curve(peak_s, **parts):
    whole = sum(parts.values())
    return MemoryCurve(
        times_s=(0.0, peak_s, 9.0), num_bytes=(0, whole, whole // 2), peak_parts=parts
    )


def test_the_largest_peak_is_told_with_its_parts():
    timeline = Timeline((row(("0F0", 0, 9)), row(("1F0", 0, 9))))
    parts = {"saved": GIB, "parameters": 3 * GIB, "kept": 0, "transfers": GIB // 100}
    low, high = curve(1.0, saved=GIB), curve(2.5, **parts)  # of a quarter of a percent it is silent
    assert say_memory(timeline) == ""
    assert say_memory(replace(timeline, memory=(low, high))) == (
        "Device 1 needs the most memory, 4.01 GiB at 2.5 s: parameters 3 GiB and saved 1 GiB."
    )
    assert say_memory(replace(timeline, memory=(high, high))) == (
        "All devices need equal memory at their peaks, device 0 4.01 GiB at 2.5 s: parameters "
        "3 GiB and saved 1 GiB."
    )
