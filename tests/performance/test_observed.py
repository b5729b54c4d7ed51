"""Costs and devices, found again in a step that was simulated with them."""

from dataclasses import replace
from random import Random

import pytest

from jaxptis.cluster import Cluster
from jaxptis.performance import simulate
from jaxptis.performance.observed import observed
from tests.clusters import equal_devices
from tests.performance.random_steps import random_step
from tests.small_plans import layer_costs, named_plan


def test_a_slow_device_is_found():
    plan = named_plan("1f1b", 4, 6)
    costs = layer_costs(plan, lambda stage, kind: 1.0 + stage)
    cluster = equal_devices(4)
    slow = replace(cluster.devices[2], speed=1 / 3)
    now = Cluster((*cluster.devices[:2], slow, cluster.devices[3]))
    seen, devices = observed(simulate(plan, costs, now), plan, costs, cluster)
    assert [device.speed for device in devices.devices] == pytest.approx([1, 1, 1 / 3, 1])
    for layer, known in zip(seen.layers, costs.layers, strict=True):
        assert layer.forward_s == pytest.approx(known.forward_s)
        assert layer.backward_s == pytest.approx(known.backward_s)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_observed_predicts_what_was_seen(seed):
    """Random speeds, and random seconds of every stage and kind, in place of those planned for."""
    rng = Random(seed)
    step = random_step(rng)
    # Costs of tasks that took no time could not be found by scaling them.
    names = "forward_s", "backward_s", "input_grad_s", "weight_grad_s", "recompute_s"
    known = replace(
        step.costs,
        start_s=0,  # which is never scaled
        layers=tuple(
            replace(layer, **{name: 1.0 + getattr(layer, name) for name in names})
            for layer in step.costs.layers
        ),
    )
    factors = {stage: {name: rng.uniform(0.5, 2) for name in names} for stage in step.plan.stages}
    for factor in factors.values():
        factor["recompute_s"] = factor["input_grad_s"] = factor["backward_s"]
    truth = replace(
        known,
        layers=tuple(
            replace(layer, **{name: getattr(layer, name) * factor for name, factor in of.items()})
            for layer in known.layers
            for stage, of in factors.items()
            if layer.name in stage.layers
        ),
    )
    speeds = [rng.choice([1.0, 0.5, 0.3]) for _ in step.cluster.devices]
    now = replace(
        step.cluster,
        devices=tuple(
            replace(device, speed=speed)
            for device, speed in zip(step.cluster.devices, speeds, strict=True)
        ),
    )
    seen = simulate(step.plan, truth, now, blocking=True)
    again = simulate(step.plan, *observed(seen, step.plan, known, step.cluster), blocking=True)
    assert again.busy_s == pytest.approx(seen.busy_s)
    assert again.step_s == pytest.approx(seen.step_s)
