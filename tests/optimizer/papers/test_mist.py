"""1F1B of the partition that mist chooses, beside that of every other."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from jaxptis.make_plan import make_plan
from jaxptis.optimizer import mist
from jaxptis.performance import simulate
from tests.clusters import equal_devices
from tests.optimizer.papers.small_cases import TEMPORARIES, fits, plans_of_1f1b, random_case
from tests.published import PublishedPlan, published_costs, published_plans

MEMORIES = 60, 80, 100, 130


def steps_s(seed: int, memories: tuple[int | None, ...]) -> tuple[float, float] | None:
    """Return the step that mist takes and the shortest there is; None if nothing fits."""
    costs, cluster, num_microbatches = random_case(seed, memories)
    shortest_s = min(
        (
            timeline.step_s
            for plan in plans_of_1f1b(costs, len(cluster.devices), num_microbatches)
            if fits(timeline := simulate(plan, costs, cluster, blocking=True), cluster)
        ),
        default=None,
    )
    if shortest_s is None:
        with pytest.raises(ValueError, match="no partition of one stage a device fits the memory"):
            mist(costs, cluster, num_microbatches)
        return None
    timeline = simulate(mist(costs, cluster, num_microbatches), costs, cluster, blocking=True)
    assert fits(timeline, cluster)
    return timeline.step_s, shortest_s


@pytest.mark.parametrize("memories", [(None,), MEMORIES], ids=["unlimited", "limited"])
def test_beside_all_partitions(memories: tuple[int | None, ...]) -> None:
    """It descends, and a descent can end early: rarely, and not far from the shortest."""
    ratios = [
        ours / least for ours, least in filter(None, (steps_s(s, memories) for s in range(150)))
    ]
    num_shortest = sum(ratio < 1 + 1e-9 for ratio in ratios)
    print(f"{num_shortest} of {len(ratios)} are the shortest, the worst is {max(ratios):.3f} of it")
    assert min(ratios) > 1 - 1e-9
    assert num_shortest >= 0.9 * len(ratios)
    assert len(ratios) > 50
    assert (len(ratios) < 150) == (memories == MEMORIES)


@pytest.mark.parametrize("published", published_plans("tuned")[::5], ids=str)
def test_no_worse_than_balanced(published: PublishedPlan) -> None:
    costs, cluster = published_costs(published.model), equal_devices(published.num_devices)
    balanced, chosen = (
        make_plan(costs, strategy, cluster=cluster, num_microbatches=published.num_microbatches)
        for strategy in ("1f1b", "mist")
    )
    assert simulate(chosen, costs).step_s <= simulate(balanced, costs).step_s * (1 + 1e-9)


def test_what_is_lacking_is_said() -> None:
    """No partition lacks less on the device that lacks most."""
    costs, cluster, num_microbatches = random_case(0, (40,))
    # Without transfers and temporaries there is nothing that is found out only by simulation.
    nothing: dict[str, Any] = dict.fromkeys(("input_bytes", *TEMPORARIES), 0)
    costs = replace(costs, layers=tuple(replace(layer, **nothing) for layer in costs.layers))
    lacks = [
        max(curve.peak_bytes - 40 for curve in simulate(plan, costs, cluster).memory)
        for plan in plans_of_1f1b(costs, len(cluster.devices), num_microbatches)
    ]
    assert min(lacks) > 0
    with pytest.raises(ValueError, match=r"device \d lacks (\d+) bytes of (\d+) for") as caught:
        mist(costs, cluster, num_microbatches)
    lacking, needed = map(int, re.findall(r"(\d+) bytes of (\d+)", str(caught.value))[0])
    assert (lacking, needed) == (min(lacks), min(lacks) + 40)


def test_too_few_layers() -> None:
    costs, _, _ = random_case(0, (None,))
    few = replace(costs, layers=costs.layers[:3], tied=())
    with pytest.raises(ValueError, match="3 layers cannot fill 4 devices; pass 3 or fewer"):
        mist(few, equal_devices(4), 4)


def test_memory_moves_layers_back() -> None:
    """The first stage keeps the most microbatches: with less memory it has fewer layers."""
    costs = published_costs("llama3-8B")
    cluster = equal_devices(4)
    even = mist(costs, cluster, 8)
    peak_bytes = max(curve.peak_bytes for curve in simulate(even, costs).memory)
    devices = tuple(replace(each, memory_bytes=peak_bytes - 4) for each in cluster.devices)
    tight = mist(costs, replace(cluster, devices=devices), 8)
    first, fewer = (plan.boundaries[1] for plan in (even, tight))
    assert fewer < first
    assert fits(simulate(tight, costs), replace(cluster, devices=devices))
    assert all(start < end for start, end in pairwise(tight.boundaries))
