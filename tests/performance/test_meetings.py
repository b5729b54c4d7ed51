"""When devices meet to send each other what they made."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest

from jaxptis.performance.meetings import Crossing, in_sequence, meet
from jaxptis.performance.simulate import simulate
from tests.performance.random_steps import random_step

Rows = list[list[float]]


def crossing(source: int, made: int, target: int, read: int, seconds: float = 0.0) -> Crossing:
    return Crossing(source=source, target=target, made=made, read=read, seconds=seconds)


def sent_after(rows: Rows, *crossings: Crossing) -> list[tuple[int, int]]:
    """Return for each crossing how many tasks its source, and its target, has run by then."""
    counts = [0] * len(rows)
    found = {}
    for item in in_sequence(rows, crossings):
        if isinstance(item, Crossing):
            found[item] = counts[item.source], counts[item.target]
        else:
            device, number = item
            assert number == counts[device]  # in the order of its row
            counts[device] += 1
    assert counts == [len(row) for row in rows]
    return [found[each] for each in crossings]


def test_a_device_that_waits_is_met_at_once() -> None:
    assert sent_after([[2.0, 5.0], [1.0]], crossing(0, 0, 1, 0)) == [(1, 0)]


def test_a_device_waits_for_another_that_is_done_soon() -> None:
    """A second, for device 1 to end its first task; later, one of them waits two, or three."""
    rows = [[2.0, 4.0, 4.0], [3.0, 5.0, 1.0]]
    assert sent_after(rows, crossing(0, 0, 1, 2)) == [(1, 1)]


def test_a_device_goes_on_if_both_are_done_together_later() -> None:
    """In place of a second now: both end their second tasks after five."""
    rows = [[2.0, 3.0, 4.0], [3.0, 2.0, 1.0]]
    assert sent_after(rows, crossing(0, 0, 1, 2)) == [(2, 2)]


def test_a_device_goes_on_if_the_wait_is_most_of_its_next_task() -> None:
    """Two seconds are more than half of it, though device 1 then waits, three."""
    rows = [[2.0, 3.0, 4.0], [4.0, 1.0]]
    assert sent_after(rows, crossing(0, 0, 1, 1)) == [(2, 1)]


def test_one_that_waits_is_met_before_one_that_is_done_soon() -> None:
    """Device 0, after 2 s, has something for both; device 1 would be done in a second."""
    rows = [[2.0, 8.0], [3.0, 9.0, 1.0], [1.0]]
    both = crossing(0, 0, 1, 2), crossing(0, 0, 2, 0)
    assert sent_after(rows, *both) == [(1, 1), (1, 0)]
    order = [item for item in in_sequence(rows, both) if isinstance(item, Crossing)]
    assert [each.target for each in order] == [2, 1]


def test_of_several_that_are_done_soon_the_first_is_met() -> None:
    rows = [[2.0, 9.0], [4.0, 1.0, 1.0], [3.0, 5.0, 1.0]]
    order = in_sequence(rows, [crossing(0, 0, 1, 2), crossing(0, 0, 2, 2)])
    assert next(each.target for each in order if isinstance(each, Crossing)) == 2


def test_a_device_has_results_of_two_tasks_for_another_at_most() -> None:
    """It waits with its third task until device 0 is done; with other tasks it goes on."""
    rows = [[9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    sent = [crossing(1, made, 0, made + 1) for made in range(3)]
    assert sent_after(rows, *sent[:2]) == [(4, 1), (4, 1)]
    assert sent_after(rows, *sent) == [(2, 1), (2, 1), (3, 2)]


def test_what_both_have_for_each_other_is_sent_together() -> None:
    """Device 1 waits for the first forward, and sends what device 0 reads much later, too."""
    rows = [[2.0, 2.0, 2.0], [1.0, 2.0]]
    there, back = crossing(0, 0, 1, 1, 3.0), crossing(1, 0, 0, 2, 4.0)
    assert sent_after(rows, there, back) == [(1, 1), (1, 1)]
    order = np.empty(7, np.int64)
    step = (
        np.array([0, 3, 5]),
        np.array([2.0, 2.0, 2.0, 1.0, 2.0]),
        np.array([0, 1, 1, 1, 2, 2]),
        np.array([1, 0]),
        np.array([4, 2]),
        np.array([3.0, 4.0]),
        order,
    )
    assert meet(*step, 2 + 4 + 2 + 2 - 1e-3) == np.inf
    assert meet(*step, 2 + 4 + 2 + 2) == 2 + 4 + 2 + 2
    assert sorted(order.tolist()) == [-2, -1, 0, 1, 2, 3, 4]


def test_a_circle_is_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other in a circle"):
        in_sequence([[1.0, 1.0], [1.0, 1.0]], [crossing(0, 1, 1, 0), crossing(1, 1, 0, 0)])


def test_two_that_could_meet_do_not_idle() -> None:
    """In random steps: but where one of them waits for a third, which is done soon, to meet it."""
    num_transfers = 0
    for seed in range(300):
        step = random_step(Random(seed))
        timeline = simulate(step.plan, step.costs, step.cluster, blocking=True)
        ends = {span.task: span.end_s for row in timeline.spans for span in row}
        for each in timeline.transfers:
            pair = {each.source, each.target}
            busy = [span[1:] for device in pair for span in timeline.spans[device]]
            met = [
                (len(pair & {x.source, x.target}), x.start_s, x.end_s) for x in timeline.transfers
            ]
            busy += [(start, end) for num, start, end in met if num]
            idle = idle_between(busy, ends[each.made_by], each.start_s)
            assert {end for _, end in idle} <= {start for num, start, _ in met if num == 1}, seed
            num_transfers += 1
    assert num_transfers > 1000


def idle_between(spans: list[tuple[float, float]], a: float, b: float) -> list[tuple[float, float]]:
    """Return the times from a to b that none of these spans covers."""
    edges = sorted({a, b, *(edge for span in spans for edge in span if a < edge < b)})
    return [
        (left, right)
        for left, right in pairwise(edges)
        if not any(start < right and end > left for start, end in spans)
    ]
