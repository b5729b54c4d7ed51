"""Costs and devices as a measured step shows them, to plan again by."""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from jaxptis.cluster import Cluster
from jaxptis.performance.costs import Costs, LayerCost
from jaxptis.performance.timeline import Timeline
from jaxptis.plan import Plan

_MEASURED_AS = {"F": "F", "B": "BIW", "I": "IBW", "W": "WBI"}
"""For each kind of task, from which kind it is known what it takes: the first that was run."""


def observed(
    measured: Timeline, plan: Plan, costs: Costs, cluster: Cluster
) -> tuple[Costs, Cluster]:
    """Return costs and devices by which the tasks of a plan take what was measured.

    What all tasks of a device have in common is put down to the device, as its speed. What is left
    is put down to the layers of each stage, by kind of task. A task takes the median of what was
    measured of its stage and kind, and nothing beside its layers.

    Args:
        measured: a step of the plan.
        plan: that was run.
        costs: of its layers, by which it was planned.
        cluster: the devices, likewise.
    """
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for span in (span for row in measured.spans for span in row):
        seconds[span.task.stage, span.task.kind].append(span.end_s - span.start_s)
    task_s = {key: statistics.median(each) for key, each in seconds.items()}
    ranges = [range(start, end) for start, end in pairwise(plan.boundaries)]
    known_s = {
        (s, kind): costs.task_s(ranges[s], kind, plan.stages[s].recompute) for s, kind in task_s
    }
    speeds = [device.speed for device in cluster.devices]
    for device in range(plan.num_devices):
        here = [key for key in task_s if plan.stages[key[0]].device == device]
        took_s = sum(task_s[key] * len(seconds[key]) for key in here)
        expected_s = sum(known_s[key] * len(seconds[key]) for key in here)
        if took_s > 0 and expected_s > 0:
            speeds[device] = expected_s / took_s
    layers: list[LayerCost] = []
    for s, stage in enumerate(plan.stages):
        left = {
            kind: task_s[s, kind] * speeds[stage.device] / (known_s[s, kind] - costs.start_s)
            for kind in "FBIW"
            if known_s.get((s, kind), 0.0) > costs.start_s and task_s[s, kind] > 0
        }
        layers += [_slower(costs.layers[index], left) for index in ranges[s]]
    devices = (
        replace(device, speed=speed) for device, speed in zip(cluster.devices, speeds, strict=True)
    )
    return (
        replace(costs, layers=tuple(layers), start_s=0.0),
        replace(cluster, devices=tuple(devices)),
    )


def _slower(layer: LayerCost, left: Mapping[str, float]) -> LayerCost:
    of = {
        kind: next((left[each] for each in others if each in left), 1.0)
        for kind, others in _MEASURED_AS.items()
    }
    return replace(
        layer,
        forward_s=layer.forward_s * of["F"],
        backward_s=layer.backward_s * of["B"],
        input_grad_s=layer.input_grad_s * of["I"],
        weight_grad_s=layer.weight_grad_s * of["W"],
        recompute_s=layer.recompute_s * of["B"],
    )
