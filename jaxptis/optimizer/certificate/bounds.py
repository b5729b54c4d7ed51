"""Lower bounds of a step that hold for every plan: partition, placement, schedule, recomputation.

Each function says in a few lines why. Seconds of layers are those of `Least`.
"""

from collections.abc import Sequence

import numpy as np

from jaxptis.cluster import DeviceSpec
from jaxptis.optimizer.certificate.least import Least
from jaxptis.performance.costs import Costs


def work_s(least: Least, devices: Sequence[DeviceSpec], num_microbatches: int) -> float:
    """Return the seconds in which all devices together can do the work.

    More than j devices (from 0) work at a time only from when

    - a microbatch can have come to layer j, as their first layers are different; and
    - j microbatches are done with layer 0, or one with all forwards. Before that there are only
      forwards, of which a microbatch has one at a time, and layer 0 takes them one by one.

    It costs least if the fastest begin first. A plan may leave devices empty: the best number
    counts.
    """
    speeds = np.array(sorted((device.speed for device in devices), reverse=True))
    speeds = speeds[: len(least.layers)]
    j = np.arange(len(speeds))
    let_in_s = np.where(j < num_microbatches, j * least.layers[0].forward_s, np.inf)
    begins_s = np.minimum(let_in_s, least.before_s[-1])
    begins_s = np.maximum(begins_s, least.before_s[: len(speeds)]) / speeds[0]
    work_s = num_microbatches * (least.work_s + 2 * least.start_s * np.arange(1, len(speeds) + 1))
    return float(np.min((work_s + np.cumsum(speeds * begins_s)) / np.cumsum(speeds)))


def chain_s(least: Least, devices: Sequence[DeviceSpec], num_microbatches: int) -> np.ndarray:
    """Return for every layer the seconds of the chain through it, [L].

    Before its first forward, the layers before have run; it cannot be cut, so its device runs its
    forwards and input gradients of all microbatches one after the other; then the last microbatch
    goes on to the first layer.
    """
    fastest = max(device.speed for device in devices)
    layers = [layer.forward_s + layer.path_s for layer in least.layers]
    own_s = num_microbatches * (np.array(layers) + 2 * least.start_s)
    chains_s: np.ndarray = (least.before_s[:-1] + own_s + least.after_s[:-1]) / fastest
    return chains_s


def memory_s(
    costs: Costs, least: Least, devices: Sequence[DeviceSpec], num_microbatches: int
) -> float:
    """Return the seconds in which the memory of all devices can hold what microbatches save.

    What a layer saves stays from its forward to the end of its backward, at least as long as the
    microbatch takes from there to the last layer and back. Bytes times seconds of all layers and
    microbatches are at most the bytes that the devices have beside what lasts, times the step. A
    layer that is recomputed saves nothing, but is more work for the devices: in the best mixture,
    those are recomputed first that save most for each second of work.

    Returns:
        0 if memory makes no step longer.
    """
    if any(device.memory_bytes is None for device in devices):
        return 0.0
    speeds = np.array([device.speed for device in devices])
    lasting = sum(layer.lasting_bytes for layer in least.layers) + sum(least.tied_bytes)
    room = sum(device.memory_bytes or 0 for device in devices) - lasting
    # From the start of a layer's forward to the end of its path, there and back.
    back_s = least.after_s[-1] - least.after_s[:-1]
    stays_s = (least.before_s[-1] - least.before_s[:-1] + back_s) / max(speeds)
    saved = np.array([min(x.saved_bytes, x.saved_all_bytes) for x in costs.layers], float)
    byte_s = num_microbatches * saved * stays_s
    again_s = num_microbatches * np.array([layer.recompute_s for layer in costs.layers])
    if room <= 0:
        return 0.0
    # With the first n recomputed, both sums are straight lines in n: the best is where they cross.
    order = np.argsort(again_s / np.maximum(byte_s, 1e-300))
    held_s = (byte_s.sum() - np.concatenate([[0.0], np.cumsum(byte_s[order])])) / room
    busy_s = num_microbatches * least.work_s + np.concatenate([[0.0], np.cumsum(again_s[order])])
    busy_s /= speeds.sum()
    n = int(np.argmax(held_s <= busy_s))
    if n == 0:
        return 0.0
    falls_s, rises_s = held_s[n - 1] - held_s[n], busy_s[n] - busy_s[n - 1]
    part = (held_s[n - 1] - busy_s[n - 1]) / (falls_s + rises_s)
    return float(busy_s[n - 1] + part * rises_s) if rises_s else 0.0
