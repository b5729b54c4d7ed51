"""Another order for the stages of a plan."""

from dataclasses import replace
from random import Random

import pytest

from jaxptis.cluster import Cluster
from jaxptis.optimizer import reorder
from jaxptis.performance import simulate
from tests.clusters import equal_devices
from tests.performance.random_steps import random_step
from tests.small_plans import layer_costs, named_plan


def kinds(plan):
    return {(task.stage, task.kind) for row in plan.schedule for task in row}


@pytest.mark.parametrize("seed", range(8))
def test_another_order_has_the_same_programs_and_is_no_longer(seed):
    rng = Random(seed)
    steps = iter(lambda: random_step(rng), None)
    step = next(each for each in steps if kinds(each.plan) != kinds(each.plan.forward_only()))
    plan = reorder(step.plan, step.costs, step.cluster)
    assert plan.stages == step.plan.stages
    assert kinds(plan) <= kinds(step.plan)
    before, after = (
        simulate(each, step.costs, step.cluster, blocking=True) for each in (step.plan, plan)
    )
    assert after.step_s <= before.step_s
    for old, new, device in zip(before.memory, after.memory, step.cluster.devices, strict=False):
        if plan != step.plan:
            assert new.peak_bytes <= (device.memory_bytes or old.peak_bytes)


def test_waves_wait_less_where_the_first_device_is_slow():
    """Its row has forwards of two stages in turn, the second of which arrives late now."""
    plan = named_plan("hanayo", 4, 8)
    costs = layer_costs(plan, lambda stage, kind: 1.0)
    cluster = equal_devices(4)
    slow = Cluster((replace(cluster.devices[0], speed=1 / 3), *cluster.devices[1:]))
    before, after = (
        simulate(each, costs, slow, blocking=True).step_s
        for each in (plan, reorder(plan, costs, slow))
    )
    assert after < 0.97 * before
    tasks = {"F": 1, "I": 1, "W": 1, "B": 2}
    assert after >= 3 * sum(tasks[task.kind] for task in plan.schedule[0])
