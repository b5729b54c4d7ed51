"""Two timelines of one plan, made by hand."""

from dataclasses import replace
from math import inf

import pytest

from jaxptis.performance import Span, Timeline, TransferSpan
from jaxptis.plan import Task


def task(name):
    return Task.parse(name)


def transfer(source, target, made_by, reader, start_s, end_s):
    return TransferSpan(source, target, task(made_by), reader, start_s, end_s, 8)


PREDICTED = Timeline(
    (
        (Span(task("0F0"), 0.0, 1.0), Span(task("0F1"), 1.0, 2.0), Span(task("0B0"), 5.5, 7.5)),
        (Span(task("1F0"), 1.5, 2.5), Span(task("1B0"), 2.5, 5.0)),
    ),
    (transfer(0, 1, "0F0", 1, 1.0, 1.5), transfer(1, 0, "1B0", 0, 5.0, 5.5)),
)
MEASURED = Timeline(
    (
        (Span(task("0F0"), 0.0, 2.0), Span(task("0F1"), 3.0, 4.0), Span(task("0B0"), 7.0, 11.0)),
        (Span(task("1F0"), 3.0, 4.0), Span(task("1B0"), 4.0, 6.0)),
    ),
    (transfer(0, 1, "0F0", 1, 2.0, 3.0), transfer(1, 0, "1B0", 0, 6.0, 7.0)),
)


def test_each_part_stands_beside_its_own():
    found = PREDICTED.compare(MEASURED)

    def seconds(pair):
        return pair.here_s, pair.there_s

    assert seconds(found.step) == (7.5, 11.0)
    assert {kind: seconds(pair) for kind, pair in found.kinds.items()} == {
        "F": (1.0, 4 / 3),
        "B": (2.25, 3.0),
    }
    assert {key: seconds(pair) for key, pair in found.tasks.items()} == {
        (0, "F"): (1.0, 1.5),
        (0, "B"): (2.0, 4.0),
        (1, "F"): (1.0, 1.0),
        (1, "B"): (2.5, 2.0),
    }
    assert {key: seconds(pair) for key, pair in found.transfers.items()} == {
        (0, 1): (0.5, 1.0),
        (1, 0): (0.5, 1.0),
    }
    assert [seconds(pair) for pair in found.busy] == [(4.0, 7.0), (3.5, 3.0)]
    # Device 0 computes during its first predicted transfer, in what was measured it does not.
    assert [seconds(pair) for pair in found.exposed] == [(0.5, 2.0), (1.0, 2.0)]
    assert [seconds(pair) for pair in found.waiting] == [(3.0, 2.0), (3.0, 6.0)]
    assert found.step.ratio == 7.5 / 11


def test_the_text_has_a_line_for_each():
    lines = str(PREDICTED.compare(MEASURED)).splitlines()
    assert len(lines) == 2 + 2 + 4 + 2 + 2 * 3
    assert lines[1].split() == ["step", "7500.000", "11000.000", "0.682"]
    assert ["transfer", "0", "to", "1,", "mean", "500.000", "1000.000", "0.500"] in [
        line.split() for line in lines
    ]


def test_what_only_one_has_takes_the_other_no_time():
    """A first stage has no input gradient, but a plan may have its task."""
    row, other = PREDICTED.spans
    more = replace(PREDICTED, spans=((*row, Span(task("0I1"), 7.5, 7.5)), other))
    assert more.compare(MEASURED).tasks[0, "I"].ratio == 1
    longer = replace(PREDICTED, spans=((*row, Span(task("0I1"), 7.5, 8.5)), other))
    assert longer.compare(MEASURED).tasks[0, "I"].ratio == inf
    assert MEASURED.compare(longer).tasks[0, "I"].ratio == 0


def test_timelines_of_two_plans_are_refused():
    swapped = replace(MEASURED, spans=MEASURED.spans[::-1])
    with pytest.raises(ValueError, match=r"device 0 runs stages \[0\] in one timeline and \[1\]"):
        PREDICTED.compare(swapped)
    with pytest.raises(ValueError, match=r"device 1 runs stages \[1\] in one timeline and None"):
        PREDICTED.compare(replace(MEASURED, spans=MEASURED.spans[:1]))


def test_what_was_not_run_as_it_does_nothing_is_left_out_of_means():
    """The first stage has no input gradient: its I is predicted, takes no time, and is not run."""
    first, second = PREDICTED.spans
    nothing = Span(task("0I0"), 5.5, 5.5)
    split = replace(
        PREDICTED,
        spans=(
            (*first[:2], nothing, Span(task("0W0"), 5.5, 7.5)),
            (second[0], Span(task("1I0"), 2.5, 4.0), Span(task("1W0"), 4.0, 5.0)),
        ),
    )
    run = replace(split, spans=(tuple(s for s in split.spans[0] if s != nothing), split.spans[1]))
    found = split.compare(run)
    assert {pair.ratio for pair in found.kinds.values()} == {1.0}
