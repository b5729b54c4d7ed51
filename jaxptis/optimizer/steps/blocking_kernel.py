"""The seconds of a step whose transfers hold up both of their devices, compiled.

That is how the executor runs. It is `performance.blocking` for the search: a transfer stands, in
the sequence of all tasks, where it delays its two devices least by a timeline in which transfers
take no time; transfers that follow each other in the lists of both are one program. Of tasks that
start at one time another may come first here.
"""

from typing import NamedTuple

import numpy as np

from jaxptis.optimizer.compiled import compiled
from jaxptis.optimizer.steps.list_kernel import F, Stages, W


class _Row(NamedTuple):
    """The tasks of a device: where they stand among all, and when they run.

    Attributes:
        position: [N + 1]; the last is behind all.
        start_s: [N + 1]; the last is never.
        free_s: [N + 1] when the device is free for each, that is, done with the one before.
    """

    position: np.ndarray
    start_s: np.ndarray
    free_s: np.ndarray


@compiled
def blocking_step_s(
    stages: Stages, num_devices: int, num_microbatches: int, order: np.ndarray
) -> float:
    """Return the seconds of a step.

    Args:
        stages: to run.
        num_devices: that they are on.
        num_microbatches: of the step.
        order: [N, 3] stage, kind and microbatch of all tasks, each behind what it needs.
    """
    order, start_s, end_s = _in_sequence(stages, num_devices, num_microbatches, order)
    home, N = stages.home, len(order)
    # Rows, one behind the other: that of device d begins at begin[d].
    begin = np.zeros(num_devices + 1, np.int64)
    for i in range(N):
        begin[home[order[i, 0]] + 1] += 1
    begin = np.cumsum(begin + 1) - 1
    rows = _Row(
        np.full(N + num_devices, N), np.full(N + num_devices, np.inf), np.zeros(N + num_devices)
    )
    filled = begin[:-1].copy()
    for i in range(N):
        k = filled[home[order[i, 0]]]
        rows.position[k], rows.start_s[k], rows.free_s[k + 1] = i, start_s[i], end_s[i]
        filled[home[order[i, 0]]] = k + 1
    # The transfers that stand before each position, as chains.
    made = np.zeros((len(home), 2, num_microbatches), np.int64)
    first, last = np.full(N, -1), np.full(N, -1)
    following = np.full(N, -1)  # by reader: the next transfer at the same place
    for i in range(N):
        s, kind, m = order[i]
        if kind == W:
            continue
        side = 0 if kind == F else 1
        made[s, side, m] = i
        maker = s - 1 if kind == F else s + 1
        if 0 <= maker < len(home) and home[maker] != home[s]:
            place = _best_place(rows, begin, home[maker], home[s], made[maker, side, m], i)
            if first[place] < 0:
                first[place] = i
            else:
                following[last[place]] = i
            last[place] = i
    free_s = np.zeros(num_devices)
    exchange = np.full(num_devices, -1)  # that a device's list ends with, by its first transfer
    since_s = np.zeros(N)
    way_s = np.zeros((N, 2))
    for i in range(N):
        t = first[i]
        while t >= 0:
            reader, side = order[t, 0], 0 if order[t, 1] == F else 1
            maker = reader - 1 if side == 0 else reader + 1
            source, target = home[maker], home[reader]
            if exchange[source] < 0 or exchange[source] != exchange[target]:
                exchange[source] = exchange[target] = t
                since_s[t] = max(free_s[source], free_s[target])
            e = exchange[source]
            way_s[e, int(source < target)] += stages.lag_s[maker, side]
            free_s[source] = free_s[target] = since_s[e] + max(way_s[e, 0], way_s[e, 1])
            t = following[t]
        d = home[order[i, 0]]
        free_s[d] += stages.seconds[order[i, 0], order[i, 1]]
        exchange[d] = -1
    return np.max(free_s)


@compiled
def _in_sequence(
    stages: Stages, num_devices: int, num_microbatches: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tasks in the order in which they start, and when, if transfers take no time."""
    N = len(order)
    start_s, end_s = np.empty(N), np.empty(N)
    free_s = np.zeros(num_devices)
    done_s = np.zeros((len(stages.home), 2, num_microbatches))
    is_sorted = True
    for i in range(N):
        s, kind, m = order[i]
        d = stages.home[s]
        at_s = free_s[d]
        if kind == F and s:
            at_s = max(at_s, done_s[s - 1, 0, m])
        elif kind not in (F, W) and s + 1 < len(stages.home):
            at_s = max(at_s, done_s[s + 1, 1, m])
        start_s[i] = at_s
        end_s[i] = free_s[d] = at_s + stages.seconds[s, kind]
        if kind != W:
            done_s[s, 0 if kind == F else 1, m] = end_s[i]
        is_sorted = is_sorted and (i == 0 or start_s[i - 1] <= at_s)
    if is_sorted:
        return order, start_s, end_s
    sequence = np.argsort(start_s, kind="mergesort")
    return order[sequence], start_s[sequence], end_s[sequence]


@compiled
def _best_place(
    rows: _Row, begin: np.ndarray, source: int, target: int, made: int, read: int
) -> int:
    """Return the position before which a transfer stands; see `performance.transfers.Places`."""
    i = begin[source] + np.searchsorted(
        rows.position[begin[source] : begin[source + 1]], made, side="right"
    )
    j = begin[target] + np.searchsorted(
        rows.position[begin[target] : begin[target + 1]], made, side="right"
    )
    best, least_s = made + 1, np.inf
    position = made + 1
    while position <= read and least_s > 0.0:
        delay_s = max(0.0, rows.free_s[j] - rows.start_s[i], rows.free_s[i] - rows.start_s[j])
        if delay_s < least_s:
            best, least_s = position, delay_s
        if rows.position[i] < rows.position[j]:
            position = rows.position[i] + 1
            i += 1
        else:
            position = rows.position[j] + 1
            j += 1
    return best
