"""Random layers and devices, few enough to try all partitions."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from random import Random

from jaxptis.cluster import Cluster, Link
from jaxptis.performance import Costs, LayerCost, TiedParams, Timeline
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import schedule
from tests.clusters import device

TEMPORARIES = tuple(
    f"{kind}_temporary_bytes" for kind in ("forward", "backward", "input_grad", "weight_grad")
)


def random_case(seed: int, memory_bytes: tuple[int | None, ...]) -> tuple[Costs, Cluster, int]:
    """Draw layers, devices with one of these memories, and a number of microbatches.

    Some layers share parameters.
    """
    random = Random(seed)
    num_layers, num_devices = random.randint(4, 8), random.randint(2, 3)
    costs = Costs(
        tuple(
            LayerCost(
                name=f"layer{index}",
                forward_s=random.randint(1, 9),
                backward_s=random.randint(5, 15),
                input_grad_s=random.randint(1, 9),
                weight_grad_s=random.randint(0, 9),
                input_bytes=random.randint(0, 3) * (index > 0),
                saved_bytes=random.randint(0, 9),
                param_bytes=random.randint(0, 20),
                **dict.fromkeys(TEMPORARIES, random.randint(0, 9)),
            )
            for index in range(num_layers)
        )
    )
    devices = (
        device(speed=random.choice([0.5, 1.0]), memory_bytes=random.choice(memory_bytes))
        for _ in range(num_devices)
    )
    link = Link(latency_s=random.choice([0.0, 0.5]))
    cluster, num_microbatches = Cluster(tuple(devices), link), random.randint(1, 6)
    shared = random.sample([layer.name for layer in costs.layers], random.randint(2, 3))
    tied = TiedParams(layers=tuple(shared), param_bytes=random.randint(0, 20), grad_bytes=0)
    return replace(costs, tied=(tied,)), cluster, num_microbatches


def plans_of_1f1b(costs: Costs, num_devices: int, num_microbatches: int) -> Iterator[Plan]:
    """Yield 1F1B of every partition."""
    rows = schedule("1f1b", num_devices=num_devices, num_microbatches=num_microbatches)
    names, num_layers = [layer.name for layer in costs.layers], len(costs.layers)
    for cuts in combinations(range(1, num_layers), num_devices - 1):
        stages = (
            StagePlan(layers=tuple(names[start:end]), device=home)
            for home, (start, end) in enumerate(pairwise((0, *cuts, num_layers)))
        )
        yield Plan(stages=tuple(stages), schedule=rows)


def fits(timeline: Timeline, cluster: Cluster) -> bool:
    """Return whether every device has the memory that it needs."""
    return all(
        device.memory_bytes is None or curve.peak_bytes <= device.memory_bytes
        for curve, device in zip(timeline.memory, cluster.devices, strict=True)
    )
