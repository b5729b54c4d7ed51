from collections import Counter

import pytest

from jaxptis.performance import Span, Timeline
from jaxptis.pictures import gantt
from jaxptis.pictures.gantt import cells
from jaxptis.plan import Task
from tests.pictures.timelines import even, jittered, uneven


def row(*tasks):
    return tuple(Span(Task(0, kind, m), s, e) for m, (kind, s, e) in enumerate(tasks))


def test_a_cell_shows_what_runs_in_it():
    tasks = row(("F", 1.0, 3.0), ("I", 3.0, 4.0), ("W", 6.0, 8.0))
    assert cells(tasks, 8.0, 8) == "·FFI··WW"


def test_kinds_have_their_share_where_cells_hold_many_tasks():
    """1000 times F, I and W of 1, 1.2 and 0.8: of 90 cells 30, 36 and 24."""
    tasks = row(
        *(
            (kind, 3 * m + start_s, 3 * m + end_s)
            for m in range(1000)
            for kind, start_s, end_s in (("F", 0, 1), ("I", 1, 2.2), ("W", 2.2, 3))
        )
    )
    counted = Counter(cells(tasks, 3000.0, 90))
    # What is left out at the end is less than a cell of each kind.
    assert {kind: pytest.approx(n, abs=1) for kind, n in counted.items()} == {
        "F": 30,
        "I": 36,
        "W": 24,
    }


@pytest.mark.parametrize("width", [60, 80, 133])
@pytest.mark.parametrize("num_devices", [2, 12])
def test_all_lines_of_devices_are_as_wide_as_asked(width, num_devices):
    _, timeline = even("zb-v", num_devices, 2 * num_devices)
    for measured in None, jittered(timeline):
        lines = str(gantt(timeline, measured=measured, width=width)).splitlines()[:-1]
        assert {len(line) for line in lines} == {width}
        assert len(lines) == num_devices * (1 if measured is None else 2)


def test_a_line_names_its_device_and_its_bubble():
    """GPipe of 4 like devices and 12 microbatches: 3/15 of the step is bubble."""
    _, timeline = even("gpipe", 4, 12)
    *lines, foot = str(gantt(timeline)).splitlines()
    for device, line in enumerate(lines):
        assert line.startswith(f"device {device} ")
        assert line.endswith(" bubble  20 %")
    assert foot == "step 90 ms; F forward, B backward, · idle"


def test_measured_lines_stand_below_to_the_same_scale():
    """What takes half of the time fills half of the line."""
    predicted = Timeline((row(("F", 0.0, 4.0)),))
    measured = Timeline((row(("F", 0.0, 8.0)),))
    above, below, foot = str(gantt(predicted, measured=measured, width=80)).splitlines()
    assert above.startswith("device 0 predicted F")
    assert below.startswith("          measured F")
    # A line may have an odd number of characters.
    assert abs(above.count("F") * 2 - below.count("F")) <= 1
    assert foot.startswith("step 4 s predicted, step 8 s measured; ")


def test_colours_mark_the_kinds():
    _, timeline = uneven(4)
    chart = gantt(timeline)
    styled = {
        chart.plain[span.start]: span.style for span in chart.spans if span.end == span.start + 1
    }
    assert styled["F"] == "#ffffff on #0072b2"
    assert styled["B"] == "#000000 on #d55e00"


def test_too_narrow_a_chart_is_refused():
    _, timeline = uneven(4)
    with pytest.raises(ValueError, match="use 32 or more"):
        gantt(timeline, width=31)
    gantt(timeline, width=32)
