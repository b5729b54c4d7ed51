"""Change a step of few tasks task by task: what no rule gives a list schedule, for all of a stage.

A step is its tasks in one order, and a device for every stage: a device runs its tasks in this
order, each as soon as it can. Both are annealed: a task moves to another place, a stage to another
device, a backward is split, or made whole. A microbatch may so be split where another is not.
"""

from typing import NamedTuple

import numpy as np

from jaxptis.optimizer.search.anneal import step_s_of
from jaxptis.optimizer.steps.blocking_kernel import blocking_step_s
from jaxptis.optimizer.steps.candidate import (
    CUT,
    HOME,
    Candidate,
    begins_stage,
    make_stages,
    stage_around,
)
from jaxptis.optimizer.steps.list_kernel import B, F, I, Stages, W, list_step_s
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance.compiled import compiled

_HOT, _COLD = 0.03, 0.02  # at the start, of the step; at the end, of that
_NO_ORDER = np.empty((0, 3), np.int64)
_MOST_TRIES = 50_000
_WORTH_CUTTING = 0.995  # of the step; below, its layers may be stages of their own


class Order(NamedTuple):
    """A step.

    Attributes:
        layers: [L, NUM_COLUMNS] of a candidate; only their devices and stages matter.
        tasks: [N, 3] stage, kind and microbatch; the first `num` are there.
        num: [1] see above.
    """

    layers: np.ndarray
    tasks: np.ndarray
    num: np.ndarray


def order_of(problem: Problem, candidate: Candidate) -> Order:
    """Return the order of a candidate's list schedule."""
    tasks = np.empty((3 * problem.num_microbatches * problem.num_layers, 3), np.int64)
    stages, memory = make_stages(problem, candidate.layers)
    M = problem.num_microbatches
    _, num_tasks = list_step_s(stages, memory, M, candidate.rule, np.inf, tasks)
    return Order(candidate.layers, tasks, np.array([num_tasks]))


def polished(problem: Problem, candidate: Candidate, num_tasks: int, seed: int) -> Order:
    """Return an order that is at least as good as the candidate's; every layer may be a stage.

    Args:
        problem: what to plan.
        candidate: a possible one.
        num_tasks: to look at.
        seed: of what is drawn.
    """
    layers = candidate.layers.copy()
    for layer in range(1, len(layers)):
        begins = begins_stage(candidate.layers, layer)
        if not begins:
            layers[layer] = layers[layer - 1]
        layers[layer, CUT] = begins or problem.start_s == 0
    before_s, _ = step_s_of(problem, candidate, np.inf, _NO_ORDER)
    cut_s, _ = step_s_of(problem, candidate._replace(layers=layers), np.inf, _NO_ORDER)
    order = order_of(problem, candidate)
    if cut_s == np.inf:  # stages of their own may need more memory
        return order
    num_tries = min(_MOST_TRIES, num_tasks // int(order.num[0]))
    start = order_of(problem, candidate._replace(layers=layers))
    changed, step_s = anneal_order(problem, start, num_tries, seed)
    return changed if step_s < before_s * _WORTH_CUTTING else order


@compiled
def order_step_s(stages: Stages, memory: np.ndarray, problem: Problem, order: Order) -> float:
    """Return the seconds of a step; infinite if a task comes too early, or memory lacks."""
    num_stages, M = len(stages.home), problem.num_microbatches
    forward_s = np.full((num_stages, M), np.inf)
    gradient_s = np.full((num_stages, M), np.inf)
    free_s, held = np.zeros(len(memory)), np.zeros(len(memory))
    for i in range(order.num[0]):
        s, kind, m = order.tasks[i, 0], order.tasks[i, 1], order.tasks[i, 2]
        d = stages.home[s]
        if kind == F:
            at_s = forward_s[s - 1, m] + stages.lag_s[s - 1, 0] if s else 0.0
            held[d] += stages.room[s]
        elif kind == W:
            at_s = gradient_s[s, m]
            held[d] -= stages.kept[s]
        else:
            at_s = forward_s[s, m]
            if s + 1 < num_stages:
                at_s = max(at_s, gradient_s[s + 1, m] + stages.lag_s[s + 1, 1])
            held[d] -= stages.room[s] - (stages.kept[s] if kind == I else 0.0)
        if at_s == np.inf or held[d] > memory[d]:
            return np.inf
        free_s[d] = max(free_s[d], at_s) + stages.seconds[s, kind]
        if kind == F:
            forward_s[s, m] = free_s[d]
        elif kind != W:
            gradient_s[s, m] = free_s[d]
    if problem.blocking:
        return blocking_step_s(stages, len(memory), M, order.tasks[: order.num[0]])
    return np.max(free_s)


@compiled
def anneal_order(problem: Problem, order: Order, num_tries: int, seed: int) -> tuple[Order, float]:
    """Change a step again and again; return the best, and its seconds."""
    np.random.seed(seed)
    stages, memory = make_stages(problem, order.layers)
    best_s = now_s = order_step_s(stages, memory, problem, order)
    now, best, new = _copy(order), _copy(order), _copy(order)
    first = 0 if problem.trains_first else 1
    for number in range(num_tries):
        heat = _HOT * _COLD ** (number / num_tries)
        _set(new, now)
        moves = False
        while True:
            if np.random.random() < 0.1:
                a, b = stage_around(new.layers, np.random.randint(0, len(new.layers)))
                new.layers[a:b, HOME] = np.random.randint(0, len(memory))
                moves = True
            else:
                _change(new, first)
            if np.random.random() < 0.5:
                break
        if moves:
            stages, memory = make_stages(problem, new.layers)
        step_s = order_step_s(stages, memory, problem, new)
        if step_s <= now_s - heat * best_s * np.log(1.0 - np.random.random()):
            _set(now, new)
            now_s = step_s
            if now_s < best_s:
                best_s = now_s
                _set(best, now)
        elif moves:
            stages, memory = make_stages(problem, now.layers)
    return best, best_s


@compiled
def _copy(order: Order) -> Order:
    return Order(order.layers.copy(), order.tasks.copy(), order.num.copy())


@compiled
def _set(order: Order, other: Order) -> None:
    order.layers[:], order.tasks[:], order.num[:] = other


@compiled
def _change(order: Order, first: int) -> None:
    """Move a task, split a backward, or make one whole."""
    tasks, num = order.tasks, order.num[0]
    i = np.random.randint(0, num)
    s, kind = tasks[i, 0], tasks[i, 1]
    if np.random.random() < 0.9:
        far = int(1 + np.random.exponential(0.1 * num))
        j = min(num - 1, i + far) if np.random.random() < 0.5 else max(0, i - far)
        _move(tasks, i, j)
    elif kind == B and s >= first:
        tasks[i, 1] = I
        tasks[num, 0], tasks[num, 1], tasks[num, 2] = s, W, tasks[i, 2]
        order.num[0] += 1
        _move(tasks, num, i + 1)
    elif kind == I:
        tasks[i, 1] = B
        j = 0
        while tasks[j, 0] != s or tasks[j, 1] != W or tasks[j, 2] != tasks[i, 2]:
            j += 1
        order.num[0] -= 1
        _move(tasks, j, num - 1)


@compiled
def _move(tasks: np.ndarray, i: int, j: int) -> None:
    """Move the task at place i to place j."""
    step = 1 if j > i else -1
    for k in range(i, j, step):
        for column in range(3):
            x = tasks[k, column]
            tasks[k, column] = tasks[k + step, column]
            tasks[k + step, column] = x
