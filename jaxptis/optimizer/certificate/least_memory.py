"""Whether the memory of devices can hold the layers at all; and if not, how much would do.

What no plan can do without is a bound: on the device of a layer there is what lasts of it and of
the device's other layers, and, while its backward runs, what it reads, saved and was handed. What
is enough is a plan: about even stages, one a device, and one microbatch at a time.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from jaxptis.cluster import Cluster, DeviceSpec
from jaxptis.optimizer.certificate.least import Least
from jaxptis.optimizer.certificate.packing import Packing
from jaxptis.optimizer.partition.balance import balance
from jaxptis.performance import Costs, simulate
from jaxptis.plan import Plan, StagePlan, Task
from jaxptis.plan.plan import Recompute


def check_possible(costs: Costs, cluster: Cluster) -> None:
    """Check that it is not proven that no plan fits the memory.

    Raises:
        ValueError: it is; says what lacks how many bytes for what, and how many bytes or devices
            would do.
    """
    least, devices = Least.of(costs), cluster.devices
    if _may_fit(least, devices):
        return
    roomiest = max(range(len(devices)), key=lambda index: devices[index].memory_bytes or 0)
    has = devices[roomiest].memory_bytes or 0
    needs = _bytes_of_largest(least)
    largest = int(np.argmax(needs))
    lasts = int(needs[largest]) - least.layers[largest].passing_bytes
    if needs[largest] > has:
        lacks = (
            f"layer {costs.layers[largest].name!r} alone needs {needs[largest]:,} bytes on its "
            f"device: {lasts:,} for parameters, gradients and optimizer state, "
            f"{needs[largest] - lasts:,} while its backward runs; device {roomiest}, which has the "
            f"most, has {has:,}, and lacks {needs[largest] - has:,}"
        )
    else:
        total = sum(x.lasting_bytes for x in least.layers) + sum(least.tied_bytes)
        lacks = (
            f"parameters, gradients and optimizer state need {total:,} bytes, and a backward on "
            f"each device up to {max(x.passing_bytes for x in least.layers):,}; the devices have "
            f"{sum(device.memory_bytes or 0 for device in devices):,}, and whole layers do not fit"
        )
    raise ValueError(
        f"no plan fits the memory of {len(devices)} devices: {lacks}; {_remedy(costs, devices)}"
    )


def _remedy(costs: Costs, devices: Sequence[DeviceSpec]) -> str:
    """Say how much memory or how many devices would do."""
    least = Least.of(costs)
    at_least, enough = _least_bytes(least, devices), enough_bytes(costs, len(devices))
    words = f"no plan needs less than {at_least:,} bytes on each, and {enough:,} are enough"
    has = max(device.memory_bytes or 0 for device in devices)
    for number in range(len(devices) + 1, len(costs.layers) + 1):
        if enough_bytes(costs, number) <= has:
            return f"{words}, as are {number} devices of {has:,}"
    return words


def enough_bytes(costs: Costs, num_devices: int) -> int:
    """Return the memory of each device with which a plan is sure to be possible."""
    least = Least.of(costs)
    names = [layer.name for layer in costs.layers]
    num_stages = min(num_devices, len(names))
    weights = [layer.lasting_bytes for layer in least.layers]
    for number, tied in enumerate(least.tied_bytes):
        for index, layer in enumerate(least.layers):
            weights[index] += tied * (number in layer.tied)
    starts = balance(weights, num_stages)

    def peak_bytes(recompute: Recompute) -> int:
        stages = tuple(
            StagePlan(layers=tuple(names[a:b]), device=device, recompute=recompute)
            for device, (a, b) in enumerate(pairwise(starts))
        )
        rows = (
            tuple(Task(stage, kind, microbatch) for microbatch in range(2) for kind in "FB")
            for stage in range(num_stages)
        )
        timeline = simulate(Plan(stages=stages, schedule=tuple(rows)), costs)
        return max(curve.peak_bytes for curve in timeline.memory)

    return min(peak_bytes("cheap"), peak_bytes("all"))


def _bytes_of_largest(least: Least) -> np.ndarray:
    """Return what each layer needs on its device, [L]."""
    return np.array(
        [
            layer.lasting_bytes + layer.passing_bytes + sum(least.tied_bytes[n] for n in layer.tied)
            for layer in least.layers
        ]
    )


def _may_fit(least: Least, devices: Sequence[DeviceSpec]) -> bool:
    """Whether it is not proven that no plan fits."""
    if any(device.memory_bytes is None for device in devices):
        return True
    memory = [device.memory_bytes or 0 for device in devices]
    total = sum(layer.lasting_bytes for layer in least.layers) + sum(least.tied_bytes)
    if max(_bytes_of_largest(least)) > max(memory) or total > sum(memory):
        return False
    packing = Packing.of(least, devices, num_microbatches=1)
    return packing is None or packing.fits(sys.float_info.max)


def _least_bytes(least: Least, devices: Sequence[DeviceSpec]) -> int:
    """Return the most bytes of which it is proven that each device needs them, or some more."""
    low, high = 1, 2
    while not _may_fit(least, _with_memory(devices, high)):
        low, high = high, 2 * high
    while high > low:
        middle = (low + high) // 2
        if _may_fit(least, _with_memory(devices, middle)):
            high = middle
        else:
            low = middle + 1
    return high


def _with_memory(devices: Sequence[DeviceSpec], num_bytes: int) -> list[DeviceSpec]:
    return [replace(device, memory_bytes=num_bytes) for device in devices]
