"""Change a step task by task: what no rule gives a list schedule, for all of a stage.

A step is its tasks in one order, and a device for every stage: a device runs its tasks in this
order. The order is annealed: a task moves to another place, a backward is split, or made whole. A
microbatch may so be split where another is not. In a step of few tasks, a stage moves to another
device, too.

If transfers hold up their devices, a list schedule has devices wait for each other, as it does not
know where: then it is worth while to change a step of many tasks, too.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxptis.optimizer.search.anneal import step_s_of
from jaxptis.optimizer.search.starts import layers_like
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
from jaxptis.plan import Plan
from jaxptis.plan.task import KINDS

_HEAT_OF_FEW, _HEAT = 0.03, 0.0003  # of the step
_COLD = 0.02  # of the heat is left at the end
_MOVED_OF_FEW = 0.1  # of the changes move a stage
_REACH = 3  # tasks of each device that a task passes on average
_ROUNDS = (8, 0.4), (2, 0.6)  # how many orders are changed, in which part of the work
_NO_ORDER = np.empty((0, 3), np.int64)
_FEW_TASKS = 200  # of so few, the stages change, too
_MOST_TASKS = 2500  # of a stage a device, with whole backwards; of more, too few are tried
_MOST_TRIES = 50_000  # of few tasks
_WORTH_CUTTING = 0.995  # of the step; below, its layers may be stages of their own


class Order(NamedTuple):
    """A step.

    Attributes:
        layers: [L, NUM_COLUMNS] of a candidate; windows do not matter.
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


def order_like(problem: Problem, plan: Plan) -> Order:
    """Return the order of a plan for all layers."""
    tasks = np.empty((3 * problem.num_microbatches * problem.num_layers, 3), np.int64)
    of_plan = [(task.stage, KINDS.index(task.kind), task.microbatch) for task in plan.order]
    tasks[: len(of_plan)] = of_plan
    return Order(layers_like(plan), tasks, np.array([len(of_plan)]))


def polishes_many(problem: Problem) -> bool:
    """Whether orders of many tasks are polished, too; a search must leave time for that."""
    return problem.blocking and 2 * problem.num_microbatches * problem.num_devices <= _MOST_TASKS


def polished(
    problem: Problem,
    candidates: Sequence[Candidate],
    orders: Sequence[Order],
    num_tasks: int,
    seed: int,
) -> list[Order]:
    """Return orders that are no longer than before, and may need more memory than is counted here.

    If candidates have few tasks, one for each; else of the best orders, if they are to be polished.

    Args:
        problem: what to plan.
        candidates: possible ones.
        orders: of the candidates, and of other plans.
        num_tasks: to look at.
        seed: of what is drawn.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if max((order.num[0] for order in orders[: len(candidates)]), default=0) <= _FEW_TASKS:
            few = partial(_polished_few, problem, num_tasks // max(1, len(candidates)), seed)
            return list(pool.map(few, candidates))
        if not polishes_many(problem):
            return []
        found = [each for order in orders if (each := _timed(problem, order)).step_s < np.inf]
        changed: list[_Timed] = []
        for number, (num_kept, share) in enumerate(_ROUNDS):
            found = sorted(found, key=lambda each: each.step_s)[:num_kept]
            if not found:
                break
            change = partial(_changed, problem, int(share * num_tasks) // len(found))
            found = list(
                pool.map(change, range(seed + 100 * number, seed + 100 * (number + 1)), found)
            )
            changed += found
        return [each.order for each in changed]


class _Timed(NamedTuple):
    order: Order
    step_s: float


def _timed(problem: Problem, order: Order) -> _Timed:
    stages, memory = make_stages(problem, order.layers)
    return _Timed(order, float(order_step_s(stages, memory, problem, order, np.inf)))


def _changed(problem: Problem, num_tasks: int, seed: int, before: _Timed) -> _Timed:
    """Return an order of many tasks, changed by looking at so many."""
    num_tries = num_tasks // int(before.order.num[0])
    return _Timed(*anneal_order(problem, before.order, num_tries, _HEAT, 0.0, seed))


def _polished_few(problem: Problem, num_tasks: int, seed: int, candidate: Candidate) -> Order:
    """Return an order of few tasks; every layer may be a stage, and stages move."""
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
    changed, step_s = anneal_order(problem, start, num_tries, _HEAT_OF_FEW, _MOVED_OF_FEW, seed)
    return changed if step_s < before_s * _WORTH_CUTTING else order


@compiled
def order_step_s(
    stages: Stages, memory: np.ndarray, problem: Problem, order: Order, limit_s: float
) -> float:
    """Return the seconds of a step, infinite as soon as it is known to be longer than `limit_s`.

    Infinite, too, if a task comes too early, or memory lacks. With transfers that block, only the
    tasks of each device are in order.
    """
    num_stages, M, P = len(stages.home), problem.num_microbatches, len(memory)
    forward_s = np.full((num_stages, M), np.inf)
    gradient_s = np.full((num_stages, M), np.inf)
    free_s, held = np.zeros(P), np.zeros(P)
    for i in range(order.num[0]):
        s, kind, m = order.tasks[i, 0], order.tasks[i, 1], order.tasks[i, 2]
        d = stages.home[s]
        if kind == F:
            source = s - 1
            at_s = forward_s[source, m] + stages.lag_s[source, 0] if s else 0.0
            held[d] += stages.room[s]
        elif kind == W:
            source = s
            at_s = gradient_s[s, m]
            held[d] -= stages.kept[s]
        else:
            source = s
            at_s = forward_s[s, m]
            if at_s < np.inf and s + 1 < num_stages:
                source = s + 1
                at_s = max(at_s, gradient_s[source, m] + stages.lag_s[source, 1])
            held[d] -= stages.room[s] - (stages.kept[s] if kind == I else 0.0)
        if held[d] > memory[d]:
            return np.inf
        if at_s == np.inf:
            if not problem.blocking or stages.home[source] == d:
                return np.inf
            at_s = 0.0
        free_s[d] = max(free_s[d], at_s) + stages.seconds[s, kind]
        if free_s[d] > limit_s and not problem.blocking:
            return np.inf
        if kind == F:
            forward_s[s, m] = free_s[d]
        elif kind != W:
            gradient_s[s, m] = free_s[d]
    if problem.blocking:
        return blocking_step_s(stages, P, M, order.tasks[: order.num[0]], limit_s)
    return np.max(free_s)


@compiled
def anneal_order(
    problem: Problem, order: Order, num_tries: int, heat: float, moved: float, seed: int
) -> tuple[Order, float]:
    """Change a step again and again; return the best, and its seconds.

    Args:
        problem: what to plan.
        order: to begin with.
        num_tries: how often.
        heat: at the start, of the step, as that of `anneal`; it falls to a fiftieth.
        moved: how often a stage goes to another device.
        seed: of what is drawn.
    """
    np.random.seed(seed)
    stages, memory = make_stages(problem, order.layers)
    best_s = now_s = order_step_s(stages, memory, problem, order, np.inf)
    now, best, new = _copy(order), _copy(order), _copy(order)
    # What is counted for tasks of a stage told whole is not what split backwards need.
    may_split = ~stages.whole | (np.min(problem.memory) == np.inf)
    may_split[0] = may_split[0] and problem.trains_first
    for number in range(num_tries):
        temperature = heat * _COLD ** (number / num_tries)
        _set(new, now)
        moves = False
        while True:
            if np.random.random() < moved:
                a, b = stage_around(new.layers, np.random.randint(0, len(new.layers)))
                new.layers[a:b, HOME] = np.random.randint(0, len(memory))
                moves = True
            else:
                _change(new, stages.home, may_split)
            if np.random.random() < 0.5:
                break
        if moves:
            stages, memory = make_stages(problem, new.layers)
        limit_s = now_s - temperature * best_s * np.log(1.0 - np.random.random())
        step_s = order_step_s(stages, memory, problem, new, limit_s)
        if step_s <= limit_s:
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
    num = other.num[0]
    order.layers[:], order.num[:], order.tasks[:num] = other.layers, other.num, other.tasks[:num]


@compiled
def _change(order: Order, home: np.ndarray, may_split: np.ndarray) -> None:
    """Move a task, split a backward, or make one whole."""
    tasks, num = order.tasks, order.num[0]
    i = np.random.randint(0, num)
    s, kind = tasks[i, 0], tasks[i, 1]
    if np.random.random() < 0.9:
        step = 1 if np.random.random() < 0.5 else -1
        far = int(1 + np.random.exponential(_REACH))  # tasks of the same device
        j = i
        while far and 0 <= j + step < num:
            j += step
            far -= home[tasks[j, 0]] == home[s]
        _move(tasks, i, j)
    elif kind == B and may_split[s]:
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
