"""Where transfers that block both of their devices stand among the tasks.

Where such a transfer stands decides how long its devices wait. It is put where, by a timeline in
which transfers take no time, it delays them least. All tasks stand in one sequence, and both
devices have the transfer at the same place of it: so they never wait for each other in a circle.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from math import inf

from jaxptis.performance.spans import Rows, Span
from jaxptis.plan import Plan


def in_sequence(plan: Plan, rows: Rows) -> list[tuple[int, Span]]:
    """Return all tasks in the order in which they start, each with its device."""
    home = [stage.device for stage in plan.stages]
    following = [iter(row) for row in rows]
    every = [(home[task.stage], next(following[home[task.stage]])) for task in plan.order]
    # Of those that start at one time, the order of the plan has first what others need.
    return sorted(every, key=lambda each: each[1].start_s)


class _Row:
    """The tasks of a device: where they stand in the sequence of all, and when they run."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.starts_s: list[float] = []
        self.free_s = [0.0]  # when it is free for each task, that is, done with the one before

    def append(self, position: int, span: Span) -> None:
        self.positions.append(position)
        self.starts_s.append(span.start_s)
        self.free_s.append(span.end_s)


class Places:
    """Where, in the sequence of all tasks, a transfer delays its two devices least."""

    def __init__(self, sequence: Sequence[tuple[int, Span]]) -> None:
        self._rows: defaultdict[int, _Row] = defaultdict(_Row)
        for position, (device, span) in enumerate(sequence):
            self._rows[device].append(position, span)
        for row in self._rows.values():  # behind the last task nothing is delayed
            row.positions.append(len(sequence))
            row.starts_s.append(inf)

    def best(self, source: int, target: int, made: int, read: int) -> int:
        """Return the position before which a transfer stands, the first of the best.

        Args:
            source: the device that sends.
            target: the device that receives.
            made: the position of the task that makes what is sent.
            read: the position of the first task that reads it.
        """
        first, second = self._rows[source], self._rows[target]
        i, j = bisect_right(first.positions, made), bisect_right(second.positions, made)
        best, least_s = made + 1, inf
        position = made + 1
        while position <= read and least_s:
            # Each end waits until the other is done with its task; the next tasks start later by
            # what that takes longer than they would have waited anyway.
            delay_s = max(
                0.0,
                second.free_s[j] - first.starts_s[i],
                first.free_s[i] - second.starts_s[j],
            )
            if delay_s < least_s:
                best, least_s = position, delay_s
            # On to behind the next task of one of them: only there the delay changes.
            if first.positions[i] < second.positions[j]:
                position = first.positions[i] + 1
                i += 1
            else:
                position = second.positions[j] + 1
                j += 1
        return best
