"""When devices meet to send each other what they made, if a transfer holds up both of them.

A device cannot compute while it sends, nor before the other is there to receive: that costs little
if the other waits anyway, or is just done with a task. So devices do not send at once. They run
their tasks, and whenever one is done with a task, and another has something for it, or it for the
other, they meet

- if the other waits, for whatever it may be; or
- if the other is done soon: in at most half the time that the next task takes here, and in clearly
  less than one of them would wait if they met after any of the next tasks instead. Of several, the
  first to be done is met.

Then all that they have for each other is sent. A device waits if it lacks what its next task reads;
if it has results of two tasks for a device, and would make a third; and if it has run all its
tasks. Two that wait never have anything for each other, as the later one has met the other: so if
all wait, the rows themselves are in a circle.

All devices agree on this beforehand, by the predicted seconds of tasks and transfers: the result is
one sequence of tasks and transfers, of which each device runs its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from jaxptis.performance.compiled import compiled
from jaxptis.performance.task_costs import TaskCosts
from jaxptis.plan import Plan, Task

_OF_NEXT = 0.5  # of the next task, that a device waits for another at most
_OF_LATER = 0.7  # of the wait if they met later
_AHEAD = 8  # tasks of both that are looked at
_MOST_HELD = 2  # tasks whose results a device holds for another


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What a task makes for a task of another device.

    Attributes:
        source: the device that makes it.
        target: the device that reads it.
        made: the number of the task in the row of the source.
        read: the number of the first task in the row of the target that reads it.
        seconds: that its transfer takes.
    """

    source: int
    target: int
    made: int
    read: int
    seconds: float


def sequence_of(plan: Plan, costs: TaskCosts) -> list[Task | Crossing]:
    """Return the tasks of a plan, and what crosses between its devices, as they happen."""
    seconds = [[costs[task.stage][task.kind].task_s for task in row] for row in plan.schedule]
    return [
        item if isinstance(item, Crossing) else plan.schedule[item[0]][item[1]]
        for item in in_sequence(seconds, _crossings(plan, costs))
    ]


def _crossings(plan: Plan, costs: TaskCosts) -> list[Crossing]:
    """Return what goes from a device to another, and is read there."""
    read = {
        (inbox, task.microbatch): number
        for row in plan.schedule
        for number, task in enumerate(row)
        if (inbox := costs[task.stage][task.kind].inbox) is not None
    }
    return [
        Crossing(
            source=source,
            target=result.link[1],
            made=number,
            read=read[result.inbox, task.microbatch],
            seconds=result.transfer_s,
        )
        for source, row in enumerate(plan.schedule)
        for number, task in enumerate(row)
        if (result := costs[task.stage][task.kind].result) is not None
        and (result.inbox, task.microbatch) in read
    ]


def in_sequence(
    rows: Sequence[Sequence[float]], crossings: Sequence[Crossing]
) -> list[tuple[int, int] | Crossing]:
    """Return all tasks, as device and number in its row, and all crossings, as they happen.

    Args:
        rows: the seconds of the tasks of each device, in the order in which it runs them.
        crossings: between them; those of one task are sent in this order.

    Raises:
        ValueError: tasks of several devices wait for each other in a circle.
    """
    begin = [*accumulate((len(row) for row in rows), initial=0)]
    crossings = sorted(crossings, key=lambda each: begin[each.source] + each.made)
    makers = [begin[each.source] + each.made for each in crossings]
    order = np.empty(begin[-1] + len(crossings), np.int64)
    step_s = meet(
        np.array(begin),
        np.array([seconds for row in rows for seconds in row], float),
        np.searchsorted(makers, np.arange(begin[-1] + 1)),
        np.array([each.target for each in crossings], np.int64),
        np.array([begin[each.target] + each.read for each in crossings], np.int64),
        np.array([each.seconds for each in crossings], float),
        order,
        np.inf,
    )
    if step_s == np.inf:
        raise ValueError("tasks of several devices wait for each other in a circle; order the rows")
    tasks = [(device, number) for device, row in enumerate(rows) for number in range(len(row))]
    return [tasks[i] if i >= 0 else crossings[~i] for i in order.tolist()]


@compiled
def meet(
    begin: np.ndarray,
    seconds: np.ndarray,
    first: np.ndarray,
    target: np.ndarray,
    read: np.ndarray,
    crossing_s: np.ndarray,
    order: np.ndarray,
    limit_s: float,
) -> float:
    """Return the seconds of a step; infinite if devices wait for each other in a circle.

    Or as soon as it is known to be longer than `limit_s`.

    Tasks are numbered row by row, and crossings by the tasks that make them.

    Args:
        begin: [P + 1] the first task of each device; the last is the number N of tasks.
        seconds: [N] of tasks.
        first: [N + 1] the first crossing of each task; the last is the number X of crossings.
        target: [X] the device that reads each.
        read: [X] the first task there that does.
        crossing_s: [X] seconds of their transfers.
        order: [N + X] filled with tasks, and crossings x as ~x, in the order in which they happen.
        limit_s: see above.
    """
    P, N = len(begin) - 1, len(seconds)
    following = begin[:-1].copy()  # the task that a device runs next
    free_s = np.zeros(P)  # when each is done
    num_leaves = 1
    while num_leaves < P:
        num_leaves *= 2
    ready_s = np.full(num_leaves, np.inf)  # likewise, but infinite while it waits
    ready_s[:P] = 0.0
    # A tree over devices: who is ready first of those below node k, which has 2 k and 2 k + 1.
    soonest = np.empty(2 * num_leaves, np.int64)
    soonest[num_leaves:] = np.arange(num_leaves)
    for k in range(num_leaves - 1, 0, -1):
        soonest[k] = soonest[2 * k]
    left_s = np.zeros(P)
    for d in range(P):
        left_s[d] = np.sum(seconds[begin[d] : begin[d + 1]])
    limit_s *= 1 + 1e-12  # sums in another order
    lacks = np.zeros(N, np.int64)  # crossings that are not there
    for x in range(len(read)):
        lacks[read[x]] += 1
    # What is made for another device, and not sent: the first, the last, after each the next.
    oldest, newest = np.full((P, P), -1), np.full((P, P), -1)
    after = np.full(len(read), -1)
    num_held = np.zeros((P, P), np.int64)  # tasks that made them
    # The devices with which each has something to exchange, either way, in their order.
    peers, num_peers = np.empty((P, P), np.int64), np.zeros(P, np.int64)
    position = num_run = 0
    while num_run < N:
        d = soonest[1]
        if ready_s[d] + left_s[d] > limit_s or ready_s[d] == np.inf:
            return np.inf
        i, end = following[d], begin[d + 1]
        peer = -1
        soonest_s = np.inf
        for k in range(num_peers[d]):
            other = peers[d, k]
            if ready_s[other] == np.inf:
                peer = other
                break
            wait_s = free_s[other] - free_s[d]
            if i < end and wait_s > _OF_NEXT * seconds[i]:
                continue
            here_end = _first_reader(end, read, after, oldest[other, d])
            there = following[other]
            there_end = _first_reader(begin[other + 1], read, after, oldest[d, other])
            later_s = _later_s(seconds, i, here_end, free_s[d], there, there_end, free_s[other])
            if wait_s <= _OF_LATER * later_s and wait_s < soonest_s:
                peer, soonest_s = other, wait_s
        full = False
        for x in range(first[i], first[i + 1] if i < end else 0):
            full = full or num_held[d, target[x]] >= _MOST_HELD
        if peer >= 0:
            longer_s = 0.0
            for source, to in ((d, peer), (peer, d)):
                way_s = 0.0
                x = oldest[source, to]
                while x >= 0:
                    way_s += crossing_s[x]
                    lacks[read[x]] -= 1
                    order[position] = ~x
                    position += 1
                    x = after[x]
                oldest[source, to], num_held[source, to] = -1, 0
                longer_s = max(longer_s, way_s)
                _remove(peers[source], num_peers, source, to)
            free_s[d] = free_s[peer] = max(free_s[d], free_s[peer]) + longer_s
            ready_s[d] = ready_s[peer] = free_s[d]
            _update(soonest, ready_s, d)
            _update(soonest, ready_s, peer)
        elif i == end or lacks[i] or full:
            ready_s[d] = np.inf
            _update(soonest, ready_s, d)
        else:
            order[position] = i
            position += 1
            num_run += 1
            following[d] = i + 1
            free_s[d] += seconds[i]
            ready_s[d] = free_s[d]
            _update(soonest, ready_s, d)
            left_s[d] -= seconds[i]
            for x in range(first[i], first[i + 1]):
                to = target[x]
                if oldest[d, to] < 0:
                    oldest[d, to] = x
                    if oldest[to, d] < 0:
                        _insert(peers[d], num_peers, d, to)
                        _insert(peers[to], num_peers, to, d)
                else:
                    after[newest[d, to]] = x
                num_held[d, to] += num_held[d, to] == 0 or newest[d, to] < first[i]
                newest[d, to] = x
    return np.max(free_s) if P else 0.0


@compiled
def _first_reader(end: int, read: np.ndarray, after: np.ndarray, crossing: int) -> int:
    """Return the first task before `end` that reads a crossing, or one listed after it; or end."""
    while crossing >= 0:
        end = min(end, read[crossing])
        crossing = after[crossing]
    return end


@compiled
def _later_s(
    seconds: np.ndarray,
    here: int,
    here_end: int,
    here_s: float,
    there: int,
    there_end: int,
    there_s: float,
) -> float:
    """Return the least that one of two devices waits if they meet after some of their next tasks.

    Infinite if they must meet before any.

    Args:
        seconds: [N] of tasks.
        here: the next task of one device.
        here_end: the first task of it that they must meet before.
        here_s: when it is free.
        there: the next task of the other.
        there_end: the first task of that.
        there_s: when it is free.
    """
    least_s = np.inf
    for _ in range(_AHEAD):
        if here_s <= there_s:
            if here >= here_end:
                break
            here_s += seconds[here]
            here += 1
        else:
            if there >= there_end:
                break
            there_s += seconds[there]
            there += 1
        least_s = min(least_s, abs(here_s - there_s))
    return least_s


@compiled
def _update(soonest: np.ndarray, ready_s: np.ndarray, device: int) -> None:
    """Let the tree know that a device is ready at another time."""
    k = (len(ready_s) + device) // 2
    while k:
        left, right = soonest[2 * k], soonest[2 * k + 1]
        soonest[k] = right if ready_s[right] < ready_s[left] else left
        k //= 2


@compiled
def _insert(peers: np.ndarray, num_peers: np.ndarray, device: int, other: int) -> None:
    """Put another device among the sorted peers of a device."""
    k = num_peers[device]
    while k and peers[k - 1] > other:
        peers[k] = peers[k - 1]
        k -= 1
    peers[k] = other
    num_peers[device] += 1


@compiled
def _remove(peers: np.ndarray, num_peers: np.ndarray, device: int, other: int) -> None:
    """Take another device from the peers of a device."""
    num_peers[device] -= 1
    k = 0
    while peers[k] != other:
        k += 1
    for j in range(k, num_peers[device]):
        peers[j] = peers[j + 1]
