"""Search for short steps: draw many candidates, then change the best of them again and again."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from typing import NamedTuple

import numpy as np

from jaxptis.optimizer.search.anneal import Limits, anneal
from jaxptis.optimizer.search.sample import sample
from jaxptis.optimizer.search.starts import shortest
from jaxptis.optimizer.steps.candidate import Candidate, count_stages
from jaxptis.optimizer.steps.list_kernel import Rule
from jaxptis.optimizer.steps.problem import Problem

TASKS_PER_S = 20_000_000
"""What a core simulates, roughly. A search simulates a number of tasks, not for a time: so what it
finds does not depend on the machine."""

_DRAWN = 0.1  # of the search
_ROUNDS = (16, 0.002), (8, 0.001), (4, 0.001), (4, 0.0005), (2, 0.0005)
"""Of equal length: how many candidates are changed, and how hot."""
_MOST_STEPS = 50_000  # with each layer a stage; what is small is found sooner
_MOST_STEPS_A_LAYER = 3_500  # where that is more: as many layers can change places with each
STAGES_PER_DEVICE = 12


class Found(NamedTuple):
    """A candidate, and the seconds of its step."""

    step_s: float
    candidate: Candidate


def search(
    problem: Problem,
    *,
    time_limit_s: float,
    seed: int,
    starts: Sequence[np.ndarray] = (),
    stages_per_device: int = STAGES_PER_DEVICE,
    enough_s: float = 0.0,
    on_progress: Callable[[float, float], None] | None = None,
) -> list[Found]:
    """Return the best candidates, the shortest first; none if nothing fits the memory.

    Args:
        problem: what to plan.
        time_limit_s: on about two cores; see `TASKS_PER_S`. A search of few layers takes less.
        seed: the same seed finds the same.
        starts: [L, NUM_COLUMNS] layers of candidates to change beside those drawn; see `starts`.
        stages_per_device: the most of a candidate, on average.
        enough_s: a step as short as this ends the search.
        on_progress: is told now and then which fraction is done, and the shortest step so far;
            infinite if there is none.
    """
    most = min(problem.num_layers, stages_per_device * problem.num_devices)
    most_steps = max(_MOST_STEPS, _MOST_STEPS_A_LAYER * problem.num_layers)
    num_tasks = min(
        int(time_limit_s * TASKS_PER_S),
        most_steps * problem.num_layers * problem.num_devices * problem.num_microbatches,
    )
    found = _drawn(problem, int(_DRAWN * num_tasks), most, seed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        num_kept = _ROUNDS[0][0]
        limit_s = found[num_kept - 1].step_s if len(found) >= num_kept else inf
        few = (layers for layers in starts if count_stages(layers) <= most)
        begun = pool.map(partial(shortest, problem, limit_s=limit_s), few)
        found = _distinct([*found, *(Found(*each) for each in begun if each)])
        for number, (num_kept, heat) in enumerate(_ROUNDS):
            if on_progress:
                shortest_s = found[0].step_s if found else inf
                on_progress(_DRAWN + (1 - _DRAWN) * number / len(_ROUNDS), shortest_s)
            if not found or found[0].step_s <= enough_s:
                break
            best = found[:num_kept]
            share = int((1 - _DRAWN) * 2 * num_tasks / len(_ROUNDS) / len(best))
            limits = Limits(most, share, enough_s)

            def change(each: Found, k: int, heat: float = heat, limits: Limits = limits) -> Found:
                candidate, step_s = anneal(problem, each.candidate, limits, heat, seed + k)
                return Found(step_s, candidate)

            numbers = range(1000 * (number + 1), 1000 * (number + 1) + len(best))
            found = _distinct([*pool.map(change, best, numbers), *found])
    return found


def _drawn(problem: Problem, num_tasks: int, max_stages: int, seed: int) -> list[Found]:
    # Most of those drawn are given up after a tenth of their tasks.
    num = max(1000, 10 * num_tasks // (3 * problem.num_microbatches * max_stages))
    drawn = sample(problem, num, max_stages, _ROUNDS[0][0], seed)
    return _distinct(
        [
            Found(float(step_s), Candidate(layers, _rule(*rule.tolist())))
            for layers, rule, step_s in zip(*drawn, strict=True)
            if step_s < float("inf")
        ]
    )


def _rule(
    alternate: float, forward_order: float, backward_order: float, patience: float, stretch: float
) -> Rule:
    return Rule(bool(alternate), int(forward_order), int(backward_order), patience, stretch)


def _distinct(found: Sequence[Found]) -> list[Found]:
    """Return those of different lengths, the shortest first."""
    by_length: dict[float, Found] = {}
    for each in sorted(found, key=lambda each: each.step_s):
        by_length.setdefault(float(f"{each.step_s:.9g}"), each)
    return list(by_length.values())
