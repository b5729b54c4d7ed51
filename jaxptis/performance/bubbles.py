"""What a device does with the seconds of a step in which it computes nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxptis.performance.spans import Span, TransferSpan

_Interval = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """The seconds in which a device computes nothing, by when that is, and its transfers.

    Attributes:
        warm_up_s: before its first task; the whole step where there is none.
        steady_s: between its first and its last task.
        cool_down_s: after its last task.
        hidden_s: of its transfers, while it computes.
        exposed_s: of its transfers, while it does not; part of the three bubbles.
    """

    warm_up_s: float
    steady_s: float
    cool_down_s: float
    hidden_s: float
    exposed_s: float

    @property
    def idle_s(self) -> float:
        """All seconds without a task."""
        return self.warm_up_s + self.steady_s + self.cool_down_s


def bubble_of(row: Sequence[Span], transfers: Sequence[TransferSpan], step_s: float) -> Bubble:
    """Sort the idle seconds of a device, and those in which it sends or receives.

    Seconds in which several of its transfers run count once.

    Args:
        row: its tasks, in the order it runs them.
        transfers: those that it has a part in, in the order in which they start.
        step_s: the seconds of the step.
    """
    busy = _union((start_s, end_s) for _, start_s, end_s in row)
    edges = [0.0, *(moment for interval in busy for moment in interval), step_s]
    idle = list(zip(edges[::2], edges[1::2], strict=True))
    warm_up_s, *others_s = (end_s - start_s for start_s, end_s in idle)
    cool_down_s = others_s.pop() if others_s else 0.0
    moving = _union((start_s, end_s) for _, _, _, _, start_s, end_s, _ in transfers)
    return Bubble(
        warm_up_s=warm_up_s,
        steady_s=sum(others_s, 0.0),
        cool_down_s=cool_down_s,
        hidden_s=_overlap_s(moving, busy),
        exposed_s=_overlap_s(moving, idle),
    )


def _union(intervals: Iterable[_Interval]) -> list[_Interval]:
    """Join intervals, given in the order of their starts, where they touch."""
    joined: list[_Interval] = []
    until_s = -1.0
    for interval in intervals:
        start_s, end_s = interval
        if start_s > until_s:
            joined.append(interval)
            until_s = end_s
        elif end_s > until_s:
            joined[-1] = joined[-1][0], end_s
            until_s = end_s
    return joined


def _overlap_s(first: Sequence[_Interval], second: Sequence[_Interval]) -> float:
    """Return the seconds that both have; the intervals of each are in order and apart."""
    total_s, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        (start_s, end_s), (begin_s, stop_s) = first[i], second[j]
        if end_s < stop_s:
            i += 1
        else:
            end_s = stop_s
            j += 1
        if begin_s > start_s:
            start_s = begin_s
        if end_s > start_s:
            total_s += end_s - start_s
    return total_s
