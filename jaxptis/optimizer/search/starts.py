"""Candidates like plans that are known: where a search begins, beside what it draws."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, product
from math import inf

import numpy as np

from jaxptis.optimizer.search.anneal import step_s_of
from jaxptis.optimizer.search.reorder import window_of
from jaxptis.optimizer.steps.candidate import (
    CUT,
    HOME,
    NUM_COLUMNS,
    RECOMPUTE,
    WHOLE,
    WINDOW,
    Candidate,
    begins_stage,
    make_stages,
)
from jaxptis.optimizer.steps.list_kernel import DEEPEST, OLDEST, SHALLOWEST, Rule
from jaxptis.optimizer.steps.problem import AGAIN, SAVED, Problem
from jaxptis.plan import Plan

_RULES = [
    Rule(alternate, forward_order, OLDEST, 0.0, 0.0)
    for alternate, forward_order in product((True, False), (OLDEST, DEEPEST, SHALLOWEST))
] + [Rule(True, OLDEST, OLDEST, 0.0, stretch) for stretch in (1.0, 2.0, 3.0)]
_NO_ORDER = np.empty((0, 3), np.int64)


def starts_of(problem: Problem, plans: Sequence[Plan]) -> list[np.ndarray]:
    """Return layers like those of plans for all layers; if memory is limited, also recomputed.

    Each is there three times then: as planned, with all recomputed, and with as much as must be.
    """
    planned = [layers_like(plan) for plan in plans]
    if np.min(problem.memory) == inf:
        return planned
    recomputed = [layers.copy() for layers in planned]
    for layers in recomputed:
        layers[:, RECOMPUTE] = 1
    return [*planned, *recomputed, *(filled(problem, layers) for layers in recomputed)]


def in_memory(problem: Problem, plan: Plan) -> Plan:
    """Return the same stages and order, with as much recomputed as must be; see `filled`."""
    layers = layers_like(plan)
    layers[:, RECOMPUTE] = 1
    recompute = filled(problem, layers)[_first_layers(plan), RECOMPUTE]
    stages = (
        replace(stage, recompute="all" if again else "cheap")
        for stage, again in zip(plan.stages, recompute, strict=True)
    )
    return replace(plan, stages=tuple(stages))


def _first_layers(plan: Plan) -> list[int]:
    return [0, *accumulate(len(stage.layers) for stage in plan.stages[:-1])]


def layers_like(plan: Plan) -> np.ndarray:
    """Return the layers of a candidate with the stages of a plan for all, [L, NUM_COLUMNS].

    No stage has more microbatches between forward and backward than there.
    """
    layers = np.zeros((len(plan.layers), NUM_COLUMNS), np.int64)
    splits = {task.stage for row in plan.schedule for task in row if task.kind == "I"}
    window = window_of(plan)
    start, before = 0, -1
    for number, stage in enumerate(plan.stages):
        end = start + len(stage.layers)
        layers[start:end, HOME] = stage.device
        layers[start, CUT] = stage.device == before
        layers[start:end, WINDOW] = window[number]
        layers[start:end, WHOLE] = number not in splits
        layers[start:end, RECOMPUTE] = stage.recompute == "all"
        start, before = end, stage.device
    return layers


def filled(problem: Problem, layers: np.ndarray) -> np.ndarray:
    """Return layers that are all recomputed, less those for which there is memory.

    There is if their device can hold what all its stages save, or keep for weight gradients, of as
    many microbatches as they may have ahead. Stages that take most to recompute, for their bytes,
    are saved first.
    """
    layers = layers.copy()
    stages, free = make_stages(problem, layers)
    room = np.where(stages.whole, stages.room, np.maximum(stages.room, stages.kept))
    np.subtract.at(free, stages.home, stages.window * room)
    ends = np.append(np.flatnonzero(_begins(layers)), len(layers))
    again_s = np.diff(problem.seconds[ends, AGAIN])
    saved = np.maximum(np.diff(problem.held[ends, SAVED]) - room, 0.0)
    more = stages.window * saved
    for s in np.argsort(more / np.maximum(again_s, 1e-12), kind="stable"):
        if more[s] <= free[stages.home[s]]:
            free[stages.home[s]] -= more[s]
            layers[ends[s] : ends[s + 1], RECOMPUTE] = 0
    return layers


def _begins(layers: np.ndarray) -> list[bool]:
    return [begins_stage(layers, layer) for layer in range(len(layers))]


def shortest(
    problem: Problem, layers: np.ndarray, limit_s: float = inf
) -> tuple[float, Candidate] | None:
    """Return the seconds of the shortest list schedule of layers, and it; None if none is short."""
    best = None
    for rule in _RULES:
        candidate = Candidate(layers, rule)
        step_s, _ = step_s_of(problem, candidate, limit_s, _NO_ORDER)
        if step_s < limit_s:
            limit_s, best = step_s, candidate
    return best and (limit_s, best)
