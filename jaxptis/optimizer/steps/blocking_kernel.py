"""The seconds of a step whose transfers hold up both of their devices, compiled.

That is how the executor runs: `performance.blocking` for the search.
"""

import numpy as np

from jaxptis.optimizer.steps.list_kernel import F, Stages, W
from jaxptis.performance.compiled import compiled
from jaxptis.performance.meetings import meet


@compiled
def blocking_step_s(
    stages: Stages, num_devices: int, num_microbatches: int, order: np.ndarray, limit_s: float
) -> float:
    """Return the seconds of a step, infinite as soon as it is known to be longer than `limit_s`.

    Infinite, too, if devices wait for each other in a circle.

    Args:
        stages: to run.
        num_devices: that they are on.
        num_microbatches: of the step.
        order: [N, 3] stage, kind and microbatch of all tasks, those of each device in its order.
        limit_s: see above.
    """
    home, N, S = stages.home, len(order), len(stages.home)
    begin = np.zeros(num_devices + 1, np.int64)
    for i in range(N):
        begin[home[order[i, 0]] + 1] += 1
    begin = np.cumsum(begin)
    following = begin[:-1].copy()
    rows = np.empty((N, 3), np.int64)
    reader = np.empty((S, 2, num_microbatches), np.int64)  # of an input, and of a gradient
    for i in range(N):
        s, kind, m = order[i]
        number = following[home[s]]
        following[home[s]] = number + 1
        rows[number] = order[i]
        if kind != W:
            reader[s, 0 if kind == F else 1, m] = number
    seconds = np.empty(N)
    first = np.empty(N + 1, np.int64)
    target, read, crossing_s = np.empty(N, np.int64), np.empty(N, np.int64), np.empty(N)
    x = 0
    for i in range(N):
        s, kind, m = rows[i]
        seconds[i] = stages.seconds[s, kind]
        first[i] = x
        if kind == W:
            continue
        side = 0 if kind == F else 1
        to = s + 1 - 2 * side
        if 0 <= to < S and home[to] != home[s]:
            target[x], read[x] = home[to], reader[to, side, m]
            crossing_s[x] = stages.lag_s[s, side]
            x += 1
    first[N] = x
    sequence = np.empty(N + x, np.int64)
    return meet(begin, seconds, first, target[:x], read[:x], crossing_s[:x], sequence, limit_s)
