"""Make a schedule by running it: a device that is free starts, by a rule, a task that can start."""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from jaxptis.plan import Schedule, Task
from jaxptis.schedules.stage_costs import StageCosts


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a device that is free starts.

    The microbatch that came first goes first. A backward goes before a forward, or in turn with
    it; a weight gradient goes where neither can start, or where it makes room for a forward in its
    turn.

    Attributes:
        in_flight: microbatches that a device may keep for each of its stages, on average.
        num_whole: so many microbatches, the first ones, have a whole backward, the rest a split.
        alternate: whether a forward goes before a backward if the last one was a backward.
        limit_ahead: whether a stage runs only as many forwards ahead of its backwards as there are
            stages from it to the last, as in 1F1B.
    """

    in_flight: int
    num_whole: int
    alternate: bool
    limit_ahead: bool


def greedy(
    placement: Sequence[int],
    costs: StageCosts,
    num_microbatches: int,
    rule: Rule,
    transfer_s: float = 0.0,
) -> Schedule:
    """Return the rows that come of running all tasks under a rule.

    A forward starts only if its device still has room, after it, for the same microbatch in all
    later stages that the device has. So of the microbatches still on their way forward, the one
    that has gone furthest finds room once those on their way back are done, which nothing holds
    up: no rule leads into a deadlock.

    Args:
        placement: the device of every stage.
        costs: the seconds of every stage.
        num_microbatches: how many run through every stage.
        rule: which task goes first.
        transfer_s: seconds until a result is on another device.
    """
    devices = [
        _Device(
            [stage for stage, home in enumerate(placement) if home == device],
            len(placement),
            num_microbatches,
            rule,
        )
        for device in range(max(placement) + 1)
    ]
    for microbatch in range(num_microbatches):
        devices[placement[0]].arrive(Task(0, "F", microbatch))
    events: list[tuple[float, int, int, Task | None]] = []
    numbers = count()  # between events of one time, the first made goes first
    changed, now_s = set(placement), 0.0
    while True:
        for index in sorted(changed):
            task = devices[index].start()
            if task is None:
                continue
            end_s = now_s + costs.task_s(task.stage, task.kind)
            heapq.heappush(events, (end_s, next(numbers), index, None))
            after = _next(task, len(placement))
            if after is not None:
                home = placement[after.stage]
                arrival_s = end_s + (transfer_s if home != index else 0.0)
                heapq.heappush(events, (arrival_s, next(numbers), home, after))
        if not events:
            return tuple(tuple(device.row) for device in devices)
        now_s, changed = events[0][0], set()
        while events and events[0][0] == now_s:
            _, _, index, arrived = heapq.heappop(events)
            changed.add(index)
            if arrived is None:
                devices[index].end()
            else:
                devices[index].arrive(arrived)


def _next(task: Task, num_stages: int) -> Task | None:
    """Return the task that a result is for; B stands for a backward, whole or split."""
    stage, microbatch = task.stage, task.microbatch
    if task.kind == "F" and stage + 1 < num_stages:
        return Task(stage + 1, "F", microbatch)
    if task.kind == "F":
        return Task(stage, "B", microbatch)
    if task.kind in "BI" and stage:
        return Task(stage - 1, "B", microbatch)
    return None


class _Device:
    """What a device has run, and what has arrived."""

    def __init__(
        self, stages: list[int], num_stages: int, num_microbatches: int, rule: Rule
    ) -> None:
        self.row: list[Task] = []
        self._rule = rule
        self._running = False
        self._was_backward = False
        self._kept = 0
        self._room = min(rule.in_flight, num_microbatches) * len(stages)
        self._num_later = {stage: later for later, stage in enumerate(reversed(stages))}
        self._ahead = dict.fromkeys(stages, 0)
        self._max_ahead = {
            stage: num_stages - stage if rule.limit_ahead else num_microbatches for stage in stages
        }
        # What has arrived, oldest first, of every stage: a stage takes microbatches in order.
        self._forwards: dict[int, deque[Task]] = {stage: deque() for stage in stages}
        self._backwards: dict[int, deque[Task]] = {stage: deque() for stage in stages}
        self._weight_grads: deque[Task] = deque()

    def arrive(self, task: Task) -> None:
        waiting = self._forwards if task.kind == "F" else self._backwards
        waiting[task.stage].append(task)

    def start(self) -> Task | None:
        """Start the task that the rule gives, and return it; None where none can start."""
        task = None if self._running else self._pick()
        if task is None:
            return None
        self._running = True
        self.row.append(task)
        if task.kind == "F":
            self._kept += 1
        if task.kind != "W":
            self._ahead[task.stage] += 1 if task.kind == "F" else -1
            self._was_backward = task.kind != "F"
        return task

    def end(self) -> None:
        self._running = False
        task = self.row[-1]
        if task.kind == "I":
            self._weight_grads.append(Task(task.stage, "W", task.microbatch))
        if task.kind in "BW":
            self._kept -= 1

    def _pick(self) -> Task | None:
        forward = _oldest(tasks for stage, tasks in self._forwards.items() if self._fits(stage))
        backward = _oldest(self._backwards.values())
        turn = self._was_backward and self._rule.alternate
        if forward is not None and (turn or backward is None):
            return forward.popleft()
        make_room = turn and forward is None and any(self._forwards.values())
        if self._weight_grads and (backward is None or make_room):
            return self._weight_grads.popleft()
        if backward is None:
            return None
        task = backward.popleft()
        is_whole = task.microbatch < self._rule.num_whole
        return task if is_whole else Task(task.stage, "I", task.microbatch)

    def _fits(self, stage: int) -> bool:
        has_room = self._kept + 1 + self._num_later[stage] <= self._room
        return has_room and self._ahead[stage] < self._max_ahead[stage]


def _oldest(waiting: Iterable[deque[Task]]) -> deque[Task] | None:
    """Return the queue whose first microbatch came first; None where none waits."""
    return min(filter(None, waiting), key=lambda tasks: tasks[0].microbatch, default=None)
