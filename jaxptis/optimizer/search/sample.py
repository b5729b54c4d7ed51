"""Draw candidates: partitions that are about even, placements in legs, any rule."""

import numpy as np

from jaxptis.optimizer.search.anneal import step_s_of
from jaxptis.optimizer.steps.candidate import (
    CUT,
    HOME,
    NUM_COLUMNS,
    RECOMPUTE,
    WHOLE,
    WINDOW,
    Candidate,
    least_s,
)
from jaxptis.optimizer.steps.list_kernel import MOST_STRETCHED, Rule
from jaxptis.optimizer.steps.problem import B, F, Problem
from jaxptis.performance.compiled import compiled

LOOPS, ZIGZAG, SHUFFLED, NUM_PLACEMENTS = range(4)
"""A leg has a stage on each device: always from the first to the last, or up and down, or each leg
in an order of its own."""

_MOST_TRIED = 10  # for each that is drawn
_NOISE = np.array([0.0, 0.1, 0.3, 0.6])  # of the logarithm of a stage's share


@compiled
def sample(
    problem: Problem, num: int, max_stages: int, num_kept: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw candidates, and keep the best, no two of one length.

    Args:
        problem: what to plan.
        num: how many to draw; if memory is limited, of those that can begin.
        max_stages: of a candidate.
        num_kept: how many to keep.
        seed: of what is drawn.

    Returns:
        [num_kept, L, NUM_COLUMNS] layers, [num_kept, 5] rules, and [num_kept] seconds, infinite
        where fewer were found.
    """
    np.random.seed(seed)
    L, M = len(problem.crossing_bytes), problem.num_microbatches
    no_order = np.empty((0, 3), np.int64)
    work_s = problem.seconds[:, F] + problem.seconds[:, B]
    kept = np.zeros((num_kept, L, NUM_COLUMNS), np.int64)
    rules = np.zeros((num_kept, 5))
    steps_s = np.full(num_kept, np.inf)
    layers = np.zeros((L, NUM_COLUMNS), np.int64)
    layers[:, WINDOW] = M
    ends_s = np.empty(len(problem.speed))
    crowded = np.min(problem.memory) < np.inf
    num_drawn = num_tried = 0
    while num_drawn < num and num_tried < _MOST_TRIED * num:
        num_drawn, num_tried = num_drawn + 1, num_tried + 1
        _draw(layers, work_s, problem.speed, max_stages)
        layers[:, CUT] = max_stages >= L and np.random.random() < 0.1
        if crowded:
            layers[:, WHOLE] = np.random.randint(0, 2)
            layers[:, RECOMPUTE] = 0
            layers[: _num_recomputed(L), RECOMPUTE] = 1
            _draw_windows(layers, M, len(problem.speed))
        rule = Rule(
            np.random.random() < 0.6,
            np.random.randint(0, 3),
            np.random.randint(0, 3),
            0.25 * np.random.randint(0, 4),
            MOST_STRETCHED * np.random.random() * np.random.randint(0, 2),
        )
        worst = np.argmax(steps_s)
        if least_s(problem, layers, ends_s) > steps_s[worst]:
            continue
        step_s, looked_at = step_s_of(problem, Candidate(layers, rule), steps_s[worst], no_order)
        num_drawn -= crowded and looked_at == 0  # could not begin, or too long at sight
        if step_s < steps_s[worst] and np.min(np.abs(steps_s - step_s)) > 1e-9 * step_s:
            kept[worst] = layers
            steps_s[worst] = step_s
            rules[worst, 0] = rule.alternate
            rules[worst, 1] = rule.forward_order
            rules[worst, 2] = rule.backward_order
            rules[worst, 3] = rule.patience
            rules[worst, 4] = rule.stretch
    return kept, rules, steps_s


@compiled
def _draw(layers: np.ndarray, work_s: np.ndarray, speed: np.ndarray, max_stages: int) -> None:
    """Give every layer a device."""
    L, P = len(layers), len(speed)
    fewest = min(P, max_stages)
    num_stages = int(fewest * (max_stages / fewest) ** np.random.random())
    if np.random.random() < 0.7:  # whole legs
        num_stages = max(fewest, num_stages - num_stages % P)
    placement = np.random.randint(0, NUM_PLACEMENTS)
    noise = _NOISE[np.random.randint(0, len(_NOISE))]
    leg = np.random.permutation(P) if placement == SHUFFLED else np.arange(P)
    home = np.empty(num_stages, np.int64)
    share = np.empty(num_stages)
    for s in range(num_stages):
        if s and s % P == 0:
            if placement == ZIGZAG:
                leg = leg[::-1].copy()
            elif placement == SHUFFLED:
                leg = np.random.permutation(P)
        home[s] = leg[s % P]
        share[s] = speed[home[s]] * np.exp(noise * np.random.randn())
    ends_s = np.cumsum(share) / np.sum(share) * work_s[L]
    s = 0
    for layer in range(L):
        while s < num_stages - 1 and work_s[layer] + work_s[layer + 1] > 2 * ends_s[s]:
            s += 1
        layers[layer, HOME] = home[s]


@compiled
def _num_recomputed(num_layers: int) -> int:
    """Return none, all, or any number of the first layers: later ones are saved less long."""
    part = (np.random.random() - 0.7) / 0.15
    return int(num_layers * min(1.0, max(0.0, part)))


@compiled
def _draw_windows(layers: np.ndarray, num_microbatches: int, num_devices: int) -> None:
    """Let all stages have any number of microbatches, or one number, or the fewer the later."""
    L = len(layers)
    kind = np.random.randint(0, 3)
    if kind == 0:
        layers[:, WINDOW] = num_microbatches
    elif kind == 1:
        layers[:, WINDOW] = np.random.randint(1, num_microbatches + 1)
    else:  # of 1F1B's, up to twice as many: each device is a stage further from the last
        last, slope = 1 + 3 * np.random.random(), 2 * num_devices * np.random.random()
        for layer in range(L):
            layers[layer, WINDOW] = min(num_microbatches, int(last + slope * (1 - layer / L)))
