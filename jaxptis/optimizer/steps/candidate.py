"""A candidate plan as one row of numbers a layer, so that any change of it is a candidate, too.

Layers in a row on one device are a stage, or several if it is cut. What a stage is told, its first
layer says.
"""

from typing import NamedTuple

import numpy as np

from jaxptis.optimizer.steps.list_kernel import Rule, Stages
from jaxptis.optimizer.steps.problem import AGAIN, KEPT, LASTING, SAVED, B, F, I, Problem, W
from jaxptis.performance.compiled import compiled

HOME, CUT, WINDOW, WHOLE, RECOMPUTE = range(5)
"""Columns of a candidate: the device of a layer, and whether a stage begins with it though the one
before is on the same device; of a stage that begins with it, the most microbatches between forward
and backward, whether backwards are whole, and whether all is recomputed."""
NUM_COLUMNS = 5


class Candidate(NamedTuple):
    """What the search changes.

    Attributes:
        layers: [L, NUM_COLUMNS] whole numbers, see above.
        rule: of its list schedule.
    """

    layers: np.ndarray
    rule: Rule


@compiled
def begins_stage(layers: np.ndarray, layer: int) -> bool:
    """Whether a layer is the first of its stage."""
    if layer == 0 or layers[layer, CUT] == 1:
        return True
    return layers[layer, HOME] != layers[layer - 1, HOME]


@compiled
def stage_around(layers: np.ndarray, layer: int) -> tuple[int, int]:
    """Return where the stage of a layer begins and ends."""
    a, b = layer, layer + 1
    while not begins_stage(layers, a):
        a -= 1
    while b < len(layers) and not begins_stage(layers, b):
        b += 1
    return a, b


@compiled
def count_stages(layers: np.ndarray) -> int:
    """Return the number of stages of a candidate."""
    num_stages = 0
    for layer in range(len(layers)):
        num_stages += begins_stage(layers, layer)
    return num_stages


@compiled
def least_s(problem: Problem, layers: np.ndarray, end_s: np.ndarray) -> float:
    """Return what no order of tasks is below: a device waits for its first stage, then works.

    Args:
        problem: what to plan.
        layers: of a candidate.
        end_s: [P] to work in.
    """
    num_layers, M = len(layers), problem.num_microbatches
    end_s[:] = 0.0
    before_s = 0.0
    a = 0
    for b in range(1, num_layers + 1):
        d = layers[a, HOME]
        if b < num_layers and not begins_stage(layers, b):
            continue
        forward_s = problem.start_s + problem.seconds[b, F] - problem.seconds[a, F]
        if layers[a, WHOLE] == 1 or (a == 0 and not problem.trains_first):
            backward_s = problem.start_s + problem.seconds[b, B] - problem.seconds[a, B]
        else:
            backward_s = 2 * problem.start_s + problem.seconds[b, I] - problem.seconds[a, I]
            backward_s += problem.seconds[b, W] - problem.seconds[a, W]
        if layers[a, RECOMPUTE] == 1:
            backward_s += problem.seconds[b, AGAIN] - problem.seconds[a, AGAIN]
        if end_s[d] == 0.0:
            end_s[d] = before_s
        end_s[d] += M * (forward_s + backward_s) / problem.speed[d]
        before_s += forward_s / problem.speed[d]
        if b < num_layers:
            other = layers[b, HOME]
            before_s += problem.latency_s[d, other]
            before_s += problem.crossing_bytes[b] * problem.byte_s[d, other]
        a = b
    return np.max(end_s)


@compiled
def make_stages(problem: Problem, layers: np.ndarray) -> tuple[Stages, np.ndarray]:
    """Return the stages of a candidate, and the bytes that its devices have for microbatches."""
    num_layers = len(layers)
    num_stages = count_stages(layers)
    first = np.empty(num_stages + 1, np.int64)
    s = 0
    for layer in range(num_layers):
        if begins_stage(layers, layer):
            first[s] = layer
            s += 1
    first[num_stages] = num_layers
    home = np.empty(num_stages, np.int64)
    seconds = np.empty((num_stages, 4))
    lag_s = np.zeros((num_stages, 2))
    room = np.empty(num_stages)
    kept = np.empty(num_stages)
    window = np.empty(num_stages, np.int64)
    whole = np.empty(num_stages, np.bool_)
    memory = problem.memory.copy()
    most = np.zeros(len(memory))
    for s in range(num_stages):
        a, b = first[s], first[s + 1]
        d = layers[a, HOME]
        home[s] = d
        window[s] = layers[a, WINDOW]
        whole[s] = layers[a, WHOLE] == 1
        recompute = layers[a, RECOMPUTE] == 1
        again_s = problem.seconds[b, AGAIN] - problem.seconds[a, AGAIN] if recompute else 0.0
        for k in range(4):
            seconds[s, k] = problem.start_s + problem.seconds[b, k] - problem.seconds[a, k]
        seconds[s, B] += again_s
        seconds[s, I] += again_s
        if s == 0 and not problem.trains_first:
            seconds[s, I] = 0.0
            seconds[s, W] = seconds[s, B]
        seconds[s] /= problem.speed[d]
        saved = problem.held[b, SAVED] - problem.held[a, SAVED]
        kept[s] = problem.held[b, KEPT] - problem.held[a, KEPT]
        room[s] = problem.crossing_bytes[a] if recompute else saved
        if s == 0 and not problem.trains_first:
            kept[s] = room[s]
        memory[d] -= problem.held[b, LASTING] - problem.held[a, LASTING]
        taken = room[s] if whole[s] else max(room[s], kept[s])
        most[d] = max(most[d], _passing_bytes(problem, a, b, layers[a], taken))
        if b < num_layers:
            other = layers[b, HOME]
            crossing = problem.crossing_bytes[b]
            lag_s[s, 0] = problem.latency_s[d, other] + crossing * problem.byte_s[d, other]
            lag_s[s + 1, 1] = problem.latency_s[other, d] + crossing * problem.byte_s[other, d]
    memory -= most
    _share(problem, layers, memory)
    return Stages(home, seconds, lag_s, room, kept, window, whole), memory


@compiled
def _passing_bytes(problem: Problem, a: int, b: int, told: np.ndarray, room: float) -> float:
    """Return what a task of layers a to b needs at most beside the room of its microbatches."""
    saved = problem.held[b, SAVED] - problem.held[a, SAVED]
    lasts, again = (problem.crossing_bytes[a], saved) if told[RECOMPUTE] == 1 else (saved, 0.0)
    splits = told[WHOLE] == 0 and (a > 0 or problem.trains_first)
    alone = backward = held = made = 0.0
    for layer in range(b - 1, a - 1, -1):
        alone = max(alone, problem.needs[layer, F])
        if splits:
            alone = max(alone, problem.needs[layer, W])
        backward = max(backward, problem.needs[layer, I if splits else B] + held)
        held += problem.holds[layer, 1 if splits else 0]
        made += problem.holds[layer, 2] if splits else 0.0
    return max(alone, again + backward + max(0.0, lasts + made - room))


@compiled
def _share(problem: Problem, layers: np.ndarray, memory: np.ndarray) -> None:
    """Give devices back the bytes of tied parameters that another of their layers counts, too."""
    for n in range(len(problem.tied_bytes)):
        for k in range(1, problem.tied.shape[1]):
            layer = problem.tied[n, k]
            if layer < 0:
                break
            d = layers[layer, HOME]
            for other in problem.tied[n, :k]:
                if layers[other, HOME] == d:
                    memory[d] += problem.tied_bytes[n]
                    break
