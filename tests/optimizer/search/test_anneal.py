"""Devices are made to end more evenly by shifted boundaries, which change nothing else."""

from random import Random

import numpy as np
import pytest

from jaxptis.cluster import Cluster
from jaxptis.optimizer.search.anneal import even_out
from jaxptis.optimizer.steps.candidate import HOME, NUM_COLUMNS, WINDOW, begins_stage, least_s
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import Costs, LayerCost
from jaxptis.performance.compiled import compiled
from tests.clusters import device


@compiled
def set_seed(seed: int) -> None:
    """Set what compiled code draws from, which is not what numpy does here."""
    np.random.seed(seed)


def case(seed: int) -> tuple[Problem, np.ndarray]:
    """Return layers in stages on devices of several speeds, some of which may have none."""
    random = Random(seed)
    num_layers, num_devices = random.randint(1, 30), random.randint(1, 6)
    costs = Costs(
        tuple(
            LayerCost(
                name=str(index),
                forward_s=random.randint(0, 3),
                backward_s=random.randint(1, 6),
                input_grad_s=2,
                weight_grad_s=2,
                recompute_s=1,
            )
            for index in range(num_layers)
        )
    )
    devices = (device(speed=random.choice((1.0, 0.5))) for _ in range(num_devices))
    problem = Problem.of(costs, Cluster(tuple(devices)), 8)
    layers = np.array([[random.randint(0, 5) for _ in range(NUM_COLUMNS)] for _ in costs.layers])
    layers[:, 1] = [random.random() < 0.1 for _ in costs.layers]
    layers[:, WINDOW + 1 :] %= 2
    home = 0
    for index in range(num_layers):
        if random.random() < 0.3:
            home = random.randrange(num_devices)
        layers[index, HOME] = home
    return problem, layers


def stages(layers: np.ndarray) -> list[list[int]]:
    """Return the device of each stage, and what it is told."""
    return [row.tolist() for index, row in enumerate(layers) if begins_stage(layers, index)]


def ends_s(problem: Problem, layers: np.ndarray) -> np.ndarray:
    ends_s = np.empty(problem.num_devices)
    least_s(problem, layers, ends_s)
    return ends_s


@pytest.mark.parametrize("seed", range(100))
def test_stages_keep_what_they_are_told(seed: int) -> None:
    problem, before = case(seed)
    after = before.copy()
    set_seed(seed)
    even_out(problem, after, 50, np.empty(problem.num_devices))
    assert stages(after) == stages(before)
    powers = [np.sum(ends_s(problem, layers) ** 8) for layers in (before, after)]
    assert powers[1] <= powers[0]
    again = before.copy()
    set_seed(seed)
    even_out(problem, again, 50, np.empty(problem.num_devices))
    assert np.array_equal(again, after)


def test_devices_end_about_evenly() -> None:
    """24 equal layers on 4 devices, of which the first has all but three."""
    layer = {"forward_s": 1, "backward_s": 2, "input_grad_s": 1, "weight_grad_s": 1}
    costs = Costs(tuple(LayerCost(name=str(index), **layer) for index in range(24)))
    problem = Problem.of(costs, Cluster((device(),) * 4), 64)
    layers = np.zeros((24, NUM_COLUMNS), np.int64)
    layers[-3:, HOME] = 1, 2, 3
    set_seed(0)
    even_out(problem, layers, 1000, np.empty(4))
    numbers = np.bincount(layers[:, HOME])
    assert 5 <= min(numbers) <= max(numbers) <= 7  # to go on, two boundaries must be shifted
