"""Candidates like plans that are known: where a search begins, beside what it draws."""

from itertools import accumulate, product
from math import inf

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
)
from jaxptis.optimizer.steps.list_kernel import DEEPEST, OLDEST, SHALLOWEST, Rule
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.plan import Plan

_RULES = [
    Rule(alternate, forward_order, OLDEST, 0.0)
    for alternate, forward_order in product((True, False), (OLDEST, DEEPEST, SHALLOWEST))
]
_NO_ORDER = np.empty((0, 3), np.int64)


def layers_like(plan: Plan, *, recompute: bool) -> np.ndarray:
    """Return the layers of a candidate with the stages of a plan, [L, NUM_COLUMNS].

    No stage has more microbatches between forward and backward than there.

    Args:
        plan: with all layers.
        recompute: whether all stages recompute all; else those that do there.
    """
    layers = np.zeros((len(plan.layers), NUM_COLUMNS), np.int64)
    num_ahead, splits = _habits(plan)
    start, before = 0, -1
    for number, stage in enumerate(plan.stages):
        end = start + len(stage.layers)
        layers[start:end, HOME] = stage.device
        layers[start, CUT] = stage.device == before
        layers[start:end, WINDOW] = num_ahead[number]
        layers[start:end, WHOLE] = not splits[number]
        layers[start:end, RECOMPUTE] = recompute or stage.recompute == "all"
        start, before = end, stage.device
    return layers


def _habits(plan: Plan) -> tuple[list[int], list[bool]]:
    """Return how many microbatches each stage has ahead at most, and whether it splits."""
    steps: list[list[int]] = [[] for _ in plan.stages]
    splits = [False] * len(plan.stages)
    for task in (task for row in plan.schedule for task in row):
        if task.kind != "W":
            steps[task.stage].append(1 if task.kind == "F" else -1)
        splits[task.stage] |= task.kind == "I"
    return [max(accumulate(each)) for each in steps], splits


def shortest(problem: Problem, layers: np.ndarray) -> tuple[float, Candidate] | None:
    """Return the seconds of the shortest list schedule of layers, and it; None if none fits."""
    best_s, best = inf, None
    for rule in _RULES:
        candidate = Candidate(layers, rule)
        step_s, _ = step_s_of(problem, candidate, best_s, _NO_ORDER)
        if step_s < best_s:
            best_s, best = step_s, candidate
    return best and (best_s, best)
