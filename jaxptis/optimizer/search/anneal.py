"""Simulated annealing over candidates (Kirkpatrick, Gelatt, Vecchi, Science 220, 1983)."""

from typing import NamedTuple

import numpy as np

from jaxptis.optimizer.steps.blocking_kernel import blocking_step_s
from jaxptis.optimizer.steps.candidate import (
    CUT,
    HOME,
    RECOMPUTE,
    WHOLE,
    WINDOW,
    Candidate,
    count_stages,
    least_s,
    make_stages,
    stage_around,
)
from jaxptis.optimizer.steps.list_kernel import MOST_STRETCHED, Rule, list_step_s
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance.compiled import compiled

_COLD = 0.05  # of the heat is left at the end
_MOVE, _STEP = 4, 20  # tasks whose simulation takes as long as to make a move, or stages
_EVENED = 0.8  # of the changes
_MOST_SHIFTS = 60  # that are tried then
_SHIFT = 6  # tasks whose simulation takes as long as to try one


class Limits(NamedTuple):
    """Where a search ends.

    Attributes:
        max_stages: of a plan.
        num_tasks: to simulate; a search that is given as many finds the same again.
        enough_s: a step as short as this is not made shorter.
    """

    max_stages: int
    num_tasks: int
    enough_s: float


@compiled
def step_s_of(
    problem: Problem, candidate: Candidate, limit_s: float, order: np.ndarray
) -> tuple[float, int]:
    """Return the seconds of a candidate's step, and the tasks looked at; see `list_step_s`."""
    stages, memory = make_stages(problem, candidate.layers)
    M, rule = problem.num_microbatches, candidate.rule
    if not problem.blocking:
        return list_step_s(stages, memory, M, rule, limit_s, order)
    if len(order) == 0:
        order = np.empty((3 * M * len(stages.home), 3), np.int64)
    step_s, num_tasks = list_step_s(stages, memory, M, rule, limit_s, order)
    if step_s < np.inf:
        step_s = blocking_step_s(stages, len(memory), M, order[:num_tasks], limit_s)
        num_tasks *= 2
    return step_s, num_tasks


@compiled
def anneal(
    problem: Problem, start: Candidate, limits: Limits, heat: float, seed: int
) -> tuple[Candidate, float]:
    """Change a candidate again and again; return the best that was found, and its seconds.

    A change that makes the step longer by x of the best is kept with probability exp(-x / T),
    where T falls from `heat` to a twentieth of it. After most changes, layers go from stages to
    those beside, where that makes the work of devices more even: without it hardly any change of a
    good candidate is worth a simulation. Many are given up before they are simulated nevertheless:
    a device would have too much to do.

    Args:
        problem: what to plan.
        start: where to begin; its step must be possible.
        limits: where to end.
        heat: T at the start, a fraction.
        seed: of what is drawn.
    """
    np.random.seed(seed)
    no_order = np.empty((0, 3), np.int64)
    P, M = len(problem.speed), problem.num_microbatches
    crowded = np.min(problem.memory) < np.inf
    ends_s = np.empty(P)
    now, rule = start.layers.copy(), start.rule
    now_s, _ = step_s_of(problem, start, np.inf, no_order)
    best, best_rule, best_s = now.copy(), rule, now_s
    changed = now.copy()
    simulated = 0
    while simulated < limits.num_tasks and best_s > limits.enough_s:
        temperature = heat * _COLD ** (simulated / limits.num_tasks)
        changed[:] = now
        new_rule = rule
        if np.random.random() < 0.97:
            _move(changed, P, M, crowded)
            while np.random.random() < 0.6:  # what one moves away, another may bring back
                _move(changed, P, M, crowded)
        else:
            new_rule = _other_rule(rule)
        simulated += _MOVE
        if np.random.random() < _EVENED:
            # Not much longer than half a simulation.
            num_shifts = min(_MOST_SHIFTS, M * count_stages(changed) // _SHIFT)
            even_out(problem, changed, num_shifts, ends_s)
            simulated += _SHIFT * num_shifts
        limit_s = now_s - temperature * best_s * np.log(1.0 - np.random.random())
        if least_s(problem, changed, ends_s) > limit_s:
            continue
        if new_rule == rule and np.all(changed == now):
            continue
        if count_stages(changed) > limits.max_stages:
            continue
        found_s, looked_at = step_s_of(problem, Candidate(changed, new_rule), limit_s, no_order)
        simulated += _STEP + looked_at
        if found_s <= limit_s:
            now[:], rule, now_s = changed, new_rule, found_s
            if now_s < best_s * (1 - 1e-9):
                best[:], best_rule, best_s = now, rule, now_s
    return Candidate(best, best_rule), best_s


@compiled
def _move(layers: np.ndarray, num_devices: int, num_microbatches: int, crowded: bool) -> None:
    """Change one thing of a candidate."""
    L = len(layers)
    if np.random.random() < 0.25:
        _exchange(layers, np.random.randint(0, L), np.random.randint(0, L))
        return
    kind = np.random.randint(0, 14 if crowded else 10)
    layer = np.random.randint(0, L)
    a, b = stage_around(layers, layer)
    if kind < 4:  # a boundary moves: some layers go to the stage before or after
        n = 1 + min(np.random.randint(0, 3), np.random.randint(0, 3))
        if np.random.random() < 0.5:
            if a:
                _give_back(layers, a, min(a + n, b), b)
        elif b < L:
            _take(layers, a, max(b - n, a), b)
    elif kind < 6:  # a stage goes to another device
        layers[a:b, HOME] = np.random.randint(0, num_devices)
    elif kind < 8:  # two stages change places
        other_a, other_b = stage_around(layers, np.random.randint(0, L))
        home, other = layers[a, HOME], layers[other_a, HOME]
        layers[a:b, HOME] = other
        layers[other_a:other_b, HOME] = home
    elif kind < 9:  # some layers of a stage go to another device
        n = np.random.randint(1, 2 + (b - a))
        layers[layer : min(layer + n, b), HOME] = np.random.randint(0, num_devices)
    else:
        draw = np.random.random()
        if draw < 0.1:
            layers[layer, CUT] = 1 - layers[layer, CUT]
        elif draw < 0.4:
            layers[a:b, WINDOW] = _other_window(layers[a, WINDOW], num_microbatches)
        elif draw < 0.7:
            layers[a:b, WHOLE] = 1 - layers[a, WHOLE]
        elif crowded:
            layers[a:b, RECOMPUTE] = 1 - layers[a, RECOMPUTE]


@compiled
def _exchange(layers: np.ndarray, i: int, j: int) -> None:
    """Let up to three layers from i on, and from j on, of one stage each, change devices."""
    _, b = stage_around(layers, i)
    _, other_b = stage_around(layers, j)
    n = 1 + min(np.random.randint(0, 3), np.random.randint(0, 3))
    m = 1 + min(np.random.randint(0, 3), np.random.randint(0, 3))
    home, other = layers[i, HOME], layers[j, HOME]
    layers[i : min(i + n, b), HOME] = other
    layers[j : min(j + m, other_b), HOME] = home


@compiled
def even_out(problem: Problem, layers: np.ndarray, num_shifts: int, ends_s: np.ndarray) -> None:
    """Try to shift boundaries between devices by a layer; what lets them end more evenly stays.

    Args:
        problem: what to plan.
        layers: of a candidate, which are changed; its stages keep their devices.
        num_shifts: that are tried.
        ends_s: [P] to work in.
    """
    shifted = layers.copy()
    least_s(problem, layers, ends_s)
    now_s = _uneven_s(ends_s)
    for _ in range(num_shifts):
        a, b = stage_around(layers, np.random.randint(0, len(layers)))
        earlier = np.random.random() < 0.5
        other = a - 1 if earlier else b
        if b - a == 1 or other < 0 or other == len(layers):  # the stage would be gone; no other
            continue
        if layers[other, HOME] == layers[a, HOME]:
            continue
        shifted[:] = layers
        if earlier:
            _give_back(shifted, a, a + 1, b)
        else:
            _take(shifted, a, b - 1, b)
        least_s(problem, shifted, ends_s)
        new_s = _uneven_s(ends_s)
        if new_s < now_s * (1 - 1e-9):
            layers[:], now_s = shifted, new_s


@compiled
def _uneven_s(ends_s: np.ndarray) -> float:
    """Return the 8-norm: about when the last device ends, but not blind to the others."""
    last_s = np.max(ends_s)
    return last_s * np.sum((ends_s / last_s) ** 8) ** 0.125 if last_s else 0.0


@compiled
def _give_back(layers: np.ndarray, a: int, e: int, b: int) -> None:
    """Let layers a to e of the stage from a to b be the last of the stage before."""
    layers[a:e, HOME] = layers[a - 1, HOME]
    if e < b:
        layers[e, CUT:] = layers[a, CUT:]
    layers[a, CUT] = 0


@compiled
def _take(layers: np.ndarray, a: int, e: int, b: int) -> None:
    """Let layers e to b of the stage from a to b be the first of the next."""
    layers[e:b, HOME] = layers[b, HOME]
    if e > a:
        layers[e, CUT:] = layers[b, CUT:]
    layers[b, CUT] = 0


@compiled
def _other_window(window: int, num_microbatches: int) -> int:
    if np.random.random() < 0.2:
        return num_microbatches
    return max(1, min(num_microbatches, window + np.random.randint(-2, 3)))


@compiled
def _other_rule(rule: Rule) -> Rule:
    alternate, forward_order, backward_order, patience, stretch = rule
    if np.random.random() < 0.25:
        patience = 0.25 * np.random.randint(0, 4)
    elif np.random.random() < 0.25:
        stretch = MOST_STRETCHED * np.random.random() * np.random.randint(0, 2)
    elif stretch > 0.0:
        stretch = min(stretch * np.exp(0.3 * np.random.randn()), MOST_STRETCHED)
    else:
        kind = np.random.randint(0, 3)
        if kind == 0:
            alternate = not alternate
        elif kind == 1:
            forward_order = np.random.randint(0, 3)
        else:
            backward_order = np.random.randint(0, 3)
    return Rule(alternate, forward_order, backward_order, patience, stretch)
