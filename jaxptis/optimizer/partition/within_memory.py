"""The partition of one stage a device that is the most even within the memory of each."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from jaxptis.optimizer.steps.problem import LASTING, SAVED, B, F, Problem
from jaxptis.performance import Timeline


def partition_within(
    problem: Problem,
    in_flight: Sequence[int],
    run: Callable[[tuple[int, ...]], Timeline],
) -> tuple[int, ...]:
    """Cut layers so that the stage that takes longest on its device takes as little as can be.

    Among these, take the smallest sum of squares. Exact, for memory that is what lasts, see
    `Problem.of`, what a stage saves of each microbatch, and the largest temporary. What a device
    needs beside that, the timeline says; it has so much less then, and the layers are cut again.

    Args:
        problem: the layers and the devices.
        in_flight: the microbatches of which each device saves something at once.
        run: makes the timeline of a partition.

    Returns:
        The index of every stage's first layer, then the number of layers.

    Raises:
        ValueError: no partition fits; says which device lacks how many bytes.
    """
    memory = problem.memory.copy()
    num_bytes = np.array([_stage_bytes(problem, each) for each in in_flight])
    while True:
        edges = _cut(problem, num_bytes, memory)
        peaks = np.array([curve.peak_bytes for curve in run(edges).memory])
        if np.all(peaks <= problem.memory):
            return edges
        counted = np.array(
            [of[a, b] for of, (a, b) in zip(num_bytes, pairwise(edges), strict=True)]
        )
        over = peaks > problem.memory
        memory[over] = np.minimum(memory, problem.memory - (peaks - counted))[over]


def _stage_bytes(problem: Problem, in_flight: int) -> np.ndarray:
    """Return [L + 1, L + 1] bytes of a stage, by its first layer and the one after its last."""
    held = problem.held[None] - problem.held[:, None]
    lasting = held[..., LASTING]
    for layers, num_bytes in zip(problem.tied, problem.tied_bytes, strict=True):
        before = np.searchsorted(np.sort(layers[layers >= 0]), np.arange(len(held)))
        lasting = lasting - num_bytes * np.maximum(before - before[:, None] - 1, 0)
    needs = problem.needs.max(axis=1)
    most = np.zeros(held.shape[:2])
    for first in range(problem.num_layers):
        most[first, first + 1 :] = np.maximum.accumulate(needs[first:])
    return lasting + in_flight * held[..., SAVED] + most


def _cut(problem: Problem, num_bytes: np.ndarray, memory: np.ndarray) -> tuple[int, ...]:
    work_s = problem.seconds[:, F] + problem.seconds[:, B]
    stage_s = (work_s - work_s[:, None]) / problem.speed[:, None, None]
    is_stage = np.triu(np.ones(stage_s.shape[1:], bool), k=1)
    lacking = np.maximum(num_bytes - memory[:, None, None], 0.0)
    stage_s = np.where(is_stage & (lacking == 0.0), stage_s, np.inf)
    longest_s = _least_worst(stage_s)
    if longest_s < np.inf:
        return _least_sum(np.where(stage_s <= longest_s, stage_s**2, np.inf))
    lacking = np.where(is_stage, lacking, np.inf)
    edges = _least_sum(np.where(lacking <= _least_worst(lacking), lacking, np.inf))
    lacks = [of[a, b] for of, (a, b) in zip(lacking, pairwise(edges), strict=True)]
    device = int(np.argmax(lacks))
    first, end = edges[device : device + 2]
    has = int(problem.memory[device])
    raise ValueError(
        f"no partition of one stage a device fits the memory; in the one that comes closest, "
        f"device {device} lacks {int(lacks[device]):,} bytes of {has + int(lacks[device]):,} for "
        f"layers {first} to {end - 1}; pass more devices, or use smaller microbatches"
    )


def _least_worst(costs: np.ndarray) -> float:
    """Return the largest cost of a stage, of [P, L + 1, L + 1], where that is the smallest."""
    worst = np.full(costs.shape[1], np.inf)
    worst[0] = 0.0
    for cost in costs:
        worst = np.min(np.maximum(worst[:, None], cost), axis=0)
    return float(worst[-1])


def _least_sum(costs: np.ndarray) -> tuple[int, ...]:
    """Return the edges of the smallest sum of costs; there must be a finite one."""
    total = np.full(costs.shape[1], np.inf)
    total[0] = 0.0
    starts = []
    for cost in costs:
        sums = total[:, None] + cost
        starts.append(np.argmin(sums, axis=0))
        total = np.min(sums, axis=0)
    ends = accumulate(
        reversed(starts), lambda end, start: int(start[end]), initial=costs.shape[1] - 1
    )
    return tuple(ends)[::-1]
