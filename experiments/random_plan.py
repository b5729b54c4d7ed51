"""Random valid plans."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from jaxptis.plan import Plan, StagePlan, Task


def random_plan(
    rng: Random,
    *,
    split: bool = True,
    layers: Sequence[str] = (),
    num_microbatches: int = 0,
    num_devices: int = 0,
) -> Plan:
    """Returns a plan whose partition, placement and order are random, as is what recomputes.

    Backwards are whole or, with `split`, in two parts. Layers have made-up names if none are given,
    and a stage then up to three. Numbers that are not given are random, up to 4. The order is that
    of a pool of tasks, from which one that can run is drawn until none is left.
    """
    num_devices = num_devices or rng.randint(1, 4)
    num_microbatches = num_microbatches or rng.randint(1, 4)
    stages = [
        StagePlan(
            layers=names,
            device=rng.randrange(num_devices),
            recompute=rng.choices(("all", "none", "cheap"), (3, 3, 4))[0],
        )
        for names in (_cut(rng, layers, 2 * num_devices) if layers else _made_up(rng))
    ]
    last = len(stages) - 1
    pool = {}  # task -> the tasks it waits for
    for m in range(num_microbatches):
        backward = ["I" if split and rng.random() < 0.5 else "B" for _ in stages]
        for s in range(len(stages)):
            pool[Task(s, "F", m)] = {Task(s - 1, "F", m)} if s else set()
            arriving = {Task(s + 1, backward[s + 1], m)} if s < last else set()
            pool[Task(s, backward[s], m)] = {Task(s, "F", m)} | arriving
            if backward[s] == "I":
                pool[Task(s, "W", m)] = {Task(s, "I", m)}
    rows: list[list[Task]] = [[] for _ in range(num_devices)]
    while pool:
        task = rng.choice([task for task, waits in pool.items() if not waits & pool.keys()])
        del pool[task]
        rows[stages[task.stage].device].append(task)
    return Plan(stages=tuple(stages), schedule=tuple(map(tuple, rows)))


def _made_up(rng: Random) -> list[tuple[str, ...]]:
    return [
        tuple(f"stage{stage}/layer{layer}" for layer in range(rng.randint(1, 3)))
        for stage in range(rng.randint(1, 6))
    ]


def _cut(rng: Random, layers: Sequence[str], most: int) -> list[tuple[str, ...]]:
    """Cuts the layers into a random number of stages, `most` at most."""
    num_cuts = rng.randint(0, min(most, len(layers)) - 1)
    cuts = sorted(rng.sample(range(1, len(layers)), num_cuts))
    edges = [0, *cuts, len(layers)]
    return [tuple(layers[a:b]) for a, b in pairwise(edges)]
