"""A list schedule, compiled: what a device that is free starts, for all tasks of a step.

The device that can start something first is looked at next. What it could start has arrived by
then, and what others start later arrives later: so no decision comes too early. A stage takes its
microbatches in order; so all that must be known of it is which come next, and when they arrive.

A forward starts only if its device has room for it, and if, with all microbatches gone that have
all their forwards there behind them, the next one would have room for all of its own. These do go:
backwards need no more room, and if an input gradient keeps more than was saved, forwards leave free
what one of them does, and weight gradients free what others have taken. Then so does the next one:
no rule leads into a deadlock.
"""

from typing import NamedTuple

import numpy as np

from jaxptis.performance.compiled import compiled

F, B, I, W = range(4)  # noqa: E741
OLDEST, DEEPEST, SHALLOWEST = range(3)
"""Which of several stages goes first: that of the oldest microbatch, the last one, the first."""

_ROUNDING = 0.5  # of bytes
MOST_STRETCHED = 5.0  # of a rule that is searched


class Rule(NamedTuple):
    """What a device that is free starts, of what it can.

    Attributes:
        alternate: whether a forward goes before a backward if the last one was a backward; else
            backwards go first.
        forward_order: which stage's forward goes first.
        backward_order: likewise.
        patience: a weight gradient is not started if something else arrives within this fraction
            of it.
        stretch: if above 0, of forwards and backwards that one goes first which is due first, not
            what the first three say. The first microbatch is due in each stage, on its way there
            and back, so many times as late as it could be there; the next as much later as the
            busiest device takes for one.
    """

    alternate: bool
    forward_order: int
    backward_order: int
    patience: float
    stretch: float


class Stages(NamedTuple):
    """The stages of a candidate.

    Attributes:
        home: [S] their devices.
        seconds: [S, 4] of their tasks, on their devices.
        lag_s: [S, 2] until what a forward makes is at the next stage, and what a backward makes at
            the one before.
        room: [S] bytes that a microbatch has from its forward to its backward.
        kept: [S] bytes that it has from I to W.
        window: [S] the most microbatches between forward and backward, 1 or more.
        whole: [S] whether backwards are whole.
    """

    home: np.ndarray
    seconds: np.ndarray
    lag_s: np.ndarray
    room: np.ndarray
    kept: np.ndarray
    window: np.ndarray
    whole: np.ndarray


@compiled
def list_step_s(
    stages: Stages,
    memory: np.ndarray,
    num_microbatches: int,
    rule: Rule,
    limit_s: float,
    order: np.ndarray,
) -> tuple[float, int]:
    """Return the seconds of a step, infinite as soon as it is known to be longer than `limit_s`.

    And the number of tasks that were looked at.

    Args:
        stages: to run.
        memory: [P] bytes that devices have for microbatches.
        num_microbatches: of the step.
        rule: what goes first.
        limit_s: see above.
        order: [N, 3] filled with stage, kind and microbatch of all tasks, in the order in which
            they start, if it has room for them.
    """
    home, seconds, room = stages.home, stages.seconds, stages.room
    num_stages, num_devices, M = len(home), len(memory), num_microbatches
    on = np.empty((num_devices, num_stages), np.int64)
    count = np.zeros(num_devices, np.int64)
    left_s = np.zeros(num_devices)
    # What an input gradient keeps beside what was saved: forwards leave the most of it free.
    more, reserve = np.zeros(num_stages), np.zeros(num_devices)
    for s in range(num_stages):
        if not stages.whole[s]:
            more[s] = stages.kept[s] - room[s]
            reserve[home[s]] = max(reserve[home[s]], more[s])
    # Bytes for forwards, beside what a device holds, and beside what it would hold; see above.
    spare, safe = memory - reserve, memory - reserve
    # What a device has to do before its last input gradient, and what follows on others then.
    path_s = np.zeros(num_devices)
    tail_s = 0.0
    num_left = 0
    for s in range(num_stages):
        d = home[s]
        if count[d] == 0:
            path_s[d] = tail_s + stages.lag_s[s, 1]
        back_s = seconds[s, B if stages.whole[s] else I]
        tail_s += back_s + stages.lag_s[s, 1]
        path_s[d] += M * (seconds[s, F] + back_s)
        on[d, count[d]] = s
        count[d] += 1
        safe[d] -= room[s]
        if stages.whole[s]:
            left_s[d] += M * (seconds[s, F] + seconds[s, B])
            num_left += 2 * M
        else:
            left_s[d] += M * (seconds[s, F] + seconds[s, I] + seconds[s, W])
            num_left += 3 * M
    limit_s *= 1 + 1e-12  # sums in another order
    for d in range(num_devices):
        if max(left_s[d], path_s[d]) > limit_s or safe[d] < 0.0:
            return np.inf, 0
    by_due = rule.stretch > 0.0
    due_s, pace_s = _due_s(stages, rule.stretch), np.max(left_s) / M
    done = np.zeros((num_stages, 4), np.int64)  # B counts backwards, whole or split
    arrival_s = np.full((num_stages, 2, M), np.inf)
    arrival_s[0, 0, :] = 0.0
    free_s = np.zeros(num_devices)
    next_s = np.full(num_devices, np.inf)
    next_s[home[0]] = 0.0
    was_backward = np.zeros(num_devices, np.bool_)
    records = len(order) >= num_left
    forward_order, backward_order = rule.forward_order, rule.backward_order
    position = 0
    while num_left:
        d = 0
        for other in range(1, num_devices):
            if next_s[other] < next_s[d]:
                d = other
        now_s = next_s[d]
        if now_s + max(left_s[d], path_s[d]) > limit_s or now_s == np.inf:
            return np.inf, position
        # What could start now, and what goes first of it.
        forward, backward, weight = -1, -1, -1
        crowded = False  # a forward waits for memory
        held_up = False  # an input gradient does
        soon_s = np.inf
        forward_due_s = backward_due_s = blocked_due_s = np.inf
        last = on[d, count[d] - 1]
        next_through = done[last, F]
        for k in range(count[d]):
            s = on[d, k]
            if weight < 0 and done[s, W] < done[s, I]:
                weight = s
            m = done[s, B]
            if m < M:
                roomy = more[s] <= spare[d] + reserve[d] + _ROUNDING
                if arrival_s[s, 1, m] > now_s:
                    if roomy:
                        soon_s = min(soon_s, arrival_s[s, 1, m])
                elif not roomy:
                    held_up = True
                elif by_due:
                    if due_s[s, 1] + m * pace_s < backward_due_s:
                        backward, backward_due_s = s, due_s[s, 1] + m * pace_s
                elif backward < 0 or _goes_first(s, m, backward, done[backward, B], backward_order):
                    backward = s
            m = done[s, F]
            if m < M and m - done[s, B] < stages.window[s]:
                roomy = room[s] <= spare[d] and (m == next_through or room[s] <= safe[d])
                if arrival_s[s, 0, m] > now_s:
                    if roomy:
                        soon_s = min(soon_s, arrival_s[s, 0, m])
                elif not roomy:
                    crowded = True
                    blocked_due_s = min(blocked_due_s, due_s[s, 0] + m * pace_s)
                elif by_due:
                    if due_s[s, 0] + m * pace_s < forward_due_s:
                        forward, forward_due_s = s, due_s[s, 0] + m * pace_s
                elif forward < 0 or _goes_first(s, m, forward, done[forward, F], forward_order):
                    forward = s
        turn = was_backward[d] and rule.alternate
        if by_due:
            turn = (forward_due_s if forward >= 0 else blocked_due_s) < backward_due_s
        if forward >= 0 and (turn or (backward < 0 and not held_up)):
            s, kind = forward, F
        elif weight >= 0 and (backward < 0 or (turn and crowded)):
            s, kind = weight, W
            waits = soon_s - now_s < rule.patience * seconds[s, W]
            if waits and not crowded and not held_up:
                next_s[d] = soon_s
                continue
        else:
            s, kind = backward, B if stages.whole[backward] else I
        m = done[s, kind] if kind != I else done[s, B]
        if records:
            order[position, 0], order[position, 1], order[position, 2] = s, kind, m
        position += 1
        num_left -= 1
        end_s = now_s + seconds[s, kind]
        free_s[d] = end_s
        left_s[d] -= seconds[s, kind]
        if kind != W:
            path_s[d] -= seconds[s, kind]
        to, arrived = -1, m  # the stage that this is for, and its microbatch
        if kind == F:
            done[s, F] += 1
            was_backward[d] = False
            spare[d] -= room[s]
            if s == last:
                safe[d] = memory[d] - reserve[d]
                for k in range(count[d]):
                    safe[d] -= room[on[d, k]] * max(1, done[on[d, k], F] - done[s, F])
            elif m != next_through:
                safe[d] -= room[s]
            if s + 1 < num_stages:
                to = s + 1
                arrival_s[to, 0, m] = end_s + stages.lag_s[s, 0]
            else:
                arrival_s[s, 1, m] = end_s
        elif kind == W:
            done[s, W] += 1
            spare[d] += stages.kept[s]
        else:
            done[s, B] += 1
            was_backward[d] = True
            spare[d] += room[s]
            if kind == I:
                done[s, I] += 1
                spare[d] -= stages.kept[s]
            if s == on[d, 0] and m == M - 1:
                path_s[d] = 0.0
            if s:
                to = s - 1
                arrival_s[to, 1, m] = end_s + stages.lag_s[s, 1]
        # When it can start something, and whether the device that waits for this can then.
        first_s = np.inf
        next_through = done[last, F]
        for k in range(count[d]):
            s = on[d, k]
            if done[s, W] < done[s, I]:
                first_s = end_s
                break
            if done[s, B] < M:
                first_s = min(first_s, arrival_s[s, 1, done[s, B]])
            m = done[s, F]
            roomy = room[s] <= spare[d] and (m == next_through or room[s] <= safe[d])
            if m < M and m - done[s, B] < stages.window[s] and roomy:
                first_s = min(first_s, arrival_s[s, 0, m])
        next_s[d] = max(first_s, end_s)
        if to >= 0 and home[to] != d:
            other = home[to]
            if kind == F:
                startable = arrived == done[to, F] and arrived - done[to, B] < stages.window[to]
                startable = startable and room[to] <= spare[other]
                if arrived != done[on[other, count[other] - 1], F]:
                    startable = startable and room[to] <= safe[other]
            else:
                startable = arrived == done[to, B]
            if startable:
                arrives_s = arrival_s[to, 0 if kind == F else 1, arrived]
                next_s[other] = min(next_s[other], max(arrives_s, free_s[other]))
    step_s = 0.0
    for d in range(num_devices):
        step_s = max(step_s, free_s[d])
    return step_s, position


@compiled
def _due_s(stages: Stages, stretch: float) -> np.ndarray:
    """Return [S, 2] when forwards and backwards of the first microbatch are due."""
    due_s = np.empty((len(stages.home), 2))
    at_s = 0.0
    for s in range(len(stages.home)):
        due_s[s, 0] = at_s
        at_s += stretch * (stages.seconds[s, F] + stages.lag_s[s, 0])
    for s in range(len(stages.home) - 1, -1, -1):
        due_s[s, 1] = at_s
        back_s = stages.seconds[s, B if stages.whole[s] else I]
        at_s += stretch * (back_s + stages.lag_s[s, 1])
    return due_s


@compiled
def _goes_first(s: int, m: int, other: int, other_m: int, order: int) -> bool:
    """Whether stage s with microbatch m goes before another, which stands before it."""
    if order == OLDEST:
        return m < other_m
    return order == DEEPEST
