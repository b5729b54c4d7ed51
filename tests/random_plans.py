"""Random valid plans, for tests of everything that takes a plan."""

from random import Random

from hypothesis import strategies as st

from jaxptis.plan import Plan, StagePlan, Task


def random_plan(rng: Random, *, split: bool = True) -> Plan:
    """Return a plan whose partition, placement and order are random, with I and W where `split`.

    The order is that of a pool of tasks, from which one that can run is drawn until none is left.
    """
    num_devices, num_microbatches = rng.randint(1, 4), rng.randint(1, 4)
    stages = [
        StagePlan(
            layers=tuple(f"stage{stage}/layer{layer}" for layer in range(rng.randint(1, 3))),
            device=rng.randrange(num_devices),
        )
        for stage in range(rng.randint(1, 6))
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


def plans(*, split: bool = True) -> st.SearchStrategy[Plan]:
    """Return the hypothesis strategy of `random_plan`."""
    return st.randoms(use_true_random=False).map(lambda rng: random_plan(rng, split=split))
