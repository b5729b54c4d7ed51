"""A list schedule, compiled: what a device that is free starts, for all tasks of a step.

The device that can start something first is looked at next. What it could start has arrived by
then, and what others start later arrives later: so no decision comes too early. A stage takes its
microbatches in order; so all that must be known of it is which come next, and when they arrive.

A forward starts only if its device has room, after it, for the same microbatch in all later stages
that it has. Of the microbatches on their way forward the one that has gone furthest so finds room
once those on their way back are done: no rule leads into a deadlock.
"""

from typing import NamedTuple

import numpy as np

from jaxptis.optimizer.compiled import compiled

F, B, I, W = range(4)  # noqa: E741
OLDEST, DEEPEST, SHALLOWEST = range(3)
"""Which of several stages goes first: that of the oldest microbatch, the last one, the first."""


class Rule(NamedTuple):
    """What a device that is free starts, of what it can.

    Attributes:
        alternate: whether a forward goes before a backward if the last one was a backward; else
            backwards go first.
        forward_order: which stage's forward goes first.
        backward_order: likewise.
        patience: a weight gradient is not started if something else arrives within this fraction
            of it.
    """

    alternate: bool
    forward_order: int
    backward_order: int
    patience: float


class Stages(NamedTuple):
    """The stages of a candidate.

    Attributes:
        home: [S] their devices.
        seconds: [S, 4] of their tasks, on their devices.
        lag_s: [S, 2] until what a forward makes is at the next stage, and what a backward makes at
            the one before.
        room: [S] bytes that a microbatch has from its forward to its backward.
        kept: [S] bytes of these that it has from I to W.
        later: [S] bytes that later stages of the device need of it.
        window: [S] the most microbatches between forward and backward.
        whole: [S] whether backwards are whole.
    """

    home: np.ndarray
    seconds: np.ndarray
    lag_s: np.ndarray
    room: np.ndarray
    kept: np.ndarray
    later: np.ndarray
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
    num_stages, num_devices, M = len(stages.home), len(memory), num_microbatches
    # Stages are numbered anew, so that those of a device stand together: begin[d] to begin[d + 1].
    begin = np.zeros(num_devices + 1, np.int64)
    for s in range(num_stages):
        begin[stages.home[s] + 1] += 1
    for d in range(num_devices):
        begin[d + 1] += begin[d]
    at = np.empty(num_stages, np.int64)
    stage_at = np.empty(num_stages, np.int64)
    filled = begin[:-1].copy()
    for s in range(num_stages):
        d = stages.home[s]
        at[s] = filled[d]
        stage_at[filled[d]] = s
        filled[d] += 1
    left_s = np.zeros(num_devices)
    num_left = 0
    for s in range(num_stages):
        seconds = stages.seconds[s]
        if stages.whole[s]:
            left_s[stages.home[s]] += M * (seconds[F] + seconds[B])
            num_left += 2 * M
        else:
            left_s[stages.home[s]] += M * (seconds[F] + seconds[I] + seconds[W])
            num_left += 3 * M
    for d in range(num_devices):
        if left_s[d] > limit_s:
            return np.inf, 0
    records = len(order) >= num_left
    slack_s = limit_s * (1 + 1e-12)
    # By place: how many have arrived, are done, and when the next can start by arrival and window.
    arrival_s = np.empty((num_stages, 2, M))
    arrived = np.zeros((num_stages, 2), np.int64)
    done = np.zeros((num_stages, 2), np.int64)
    ready_s = np.full((num_stages, 2), np.inf)
    num_weights = np.zeros(num_stages, np.int64)  # whose input gradient is done
    waiting = np.zeros(num_devices, np.int64)  # weight gradients of a device
    first_weight = np.zeros(num_stages, np.int64)
    held = np.zeros(num_devices)
    free_s = np.zeros(num_devices)
    next_s = np.full(num_devices, np.inf)
    was_backward = np.zeros(num_devices, np.bool_)
    limited = np.zeros(num_devices, np.bool_)
    for d in range(num_devices):
        limited[d] = memory[d] < np.inf
    q = at[0]
    arrival_s[q, 0, :] = 0.0
    arrived[q, 0] = M
    ready_s[q, 0] = 0.0
    next_s[stages.home[0]] = 0.0
    position = 0
    while num_left:
        d = 0
        now_s = next_s[0]
        for other in range(1, num_devices):
            if next_s[other] < now_s:
                d, now_s = other, next_s[other]
        if now_s + left_s[d] > slack_s or now_s == np.inf:
            return np.inf, position
        # What could start now, and what goes first of it.
        forward, backward, weight = -1, -1, -1
        crowded = False  # a forward waits for memory
        soon_s = np.inf
        for q in range(begin[d], begin[d + 1]):
            at_s = ready_s[q, 1]
            if at_s <= now_s:
                if backward < 0 or _goes_first(done[q, 1], done[backward, 1], rule.backward_order):
                    backward = q
            elif at_s < soon_s:
                soon_s = at_s
            at_s = ready_s[q, 0]
            if at_s < np.inf:
                s = stage_at[q]
                if limited[d] and held[d] + stages.room[s] + stages.later[s] > memory[d]:
                    crowded = crowded or at_s <= now_s
                elif at_s <= now_s:
                    if forward < 0 or _goes_first(done[q, 0], done[forward, 0], rule.forward_order):
                        forward = q
                elif at_s < soon_s:
                    soon_s = at_s
        turn = was_backward[d] and rule.alternate
        if forward >= 0 and (turn or backward < 0):
            q, kind = forward, F
            s = stage_at[q]
            m = done[q, 0]
        elif waiting[d] > 0 and (backward < 0 or (turn and crowded)):
            q, kind = begin[d], W
            while num_weights[q] == 0:
                q += 1
            s = stage_at[q]
            if not crowded and soon_s - now_s < rule.patience * stages.seconds[s, W]:
                next_s[d] = soon_s
                continue
            m = done[q, 1] - num_weights[q]
        else:
            q = backward
            s = stage_at[q]
            kind = B if stages.whole[s] else I
            m = done[q, 1]
        if records:
            order[position, 0], order[position, 1], order[position, 2] = s, kind, m
        position += 1
        num_left -= 1
        end_s = now_s + stages.seconds[s, kind]
        free_s[d] = end_s
        left_s[d] -= stages.seconds[s, kind]
        if kind == W:
            num_weights[q] -= 1
            waiting[d] -= 1
            held[d] -= stages.kept[s]
        else:
            if kind == F:
                done[q, 0] += 1
                held[d] += stages.room[s]
                was_backward[d] = False
                if s + 1 < num_stages:
                    to, side, to_device = at[s + 1], 0, stages.home[s + 1]
                else:
                    to, side, to_device = q, 1, d
                comes_s = end_s + stages.lag_s[s, 0]
            else:
                done[q, 1] += 1
                was_backward[d] = True
                if kind == I:
                    num_weights[q] += 1
                    waiting[d] += 1
                    held[d] -= stages.room[s] - stages.kept[s]
                else:
                    held[d] -= stages.room[s]
                m_next = done[q, 1]
                ready_s[q, 1] = arrival_s[q, 1, m_next] if m_next < arrived[q, 1] else np.inf
                side = -1
                if s:
                    to, side, to_device = at[s - 1], 1, stages.home[s - 1]
                    comes_s = end_s + stages.lag_s[s, 1]
            # The window may have opened, or closed.
            m_next = done[q, 0]
            if m_next < arrived[q, 0] and m_next - done[q, 1] < stages.window[s]:
                ready_s[q, 0] = arrival_s[q, 0, m_next]
            else:
                ready_s[q, 0] = np.inf
            if side >= 0:
                number = arrived[to, side]
                arrival_s[to, side, number] = comes_s
                arrived[to, side] = number + 1
                if number == done[to, side] and (
                    side == 1 or number - done[to, 1] < stages.window[stage_at[to]]
                ):
                    ready_s[to, side] = comes_s
                    if to_device != d:
                        fits = True
                        if side == 0 and limited[to_device]:
                            k = stage_at[to]
                            room = stages.room[k] + stages.later[k]
                            fits = held[to_device] + room <= memory[to_device]
                        if fits:
                            start_s = max(comes_s, free_s[to_device])
                            next_s[to_device] = min(next_s[to_device], start_s)
        # When this device can start something again.
        if waiting[d] > 0:
            next_s[d] = end_s
        else:
            first_s = np.inf
            for q in range(begin[d], begin[d + 1]):
                first_s = min(first_s, ready_s[q, 1])
                if ready_s[q, 0] < first_s:
                    s = stage_at[q]
                    if limited[d] and held[d] + stages.room[s] + stages.later[s] > memory[d]:
                        continue
                    first_s = ready_s[q, 0]
            next_s[d] = max(first_s, end_s)
    step_s = 0.0
    for d in range(num_devices):
        step_s = max(step_s, free_s[d])
    return step_s, position


@compiled
def _goes_first(m: int, other_m: int, order: int) -> bool:
    """Whether a stage with microbatch m goes before an earlier stage of the device with another."""
    if order == OLDEST:
        return m < other_m
    return order == DEEPEST
