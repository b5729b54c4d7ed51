"""Whether the devices of a cluster have the memory that a step needs."""

from jaxptis.cluster import Cluster
from jaxptis.performance.timeline import Timeline

_REMEDIES = {
    "parameters": "give it fewer layers",
    "gradients": "give it fewer layers",
    "optimizer state": "give it fewer layers",
    "saved": "let its stages recompute more, or keep fewer microbatches in flight",
    "kept": "run its weight gradients sooner, or its backwards whole",
    "transfers": "run the tasks that read what crosses sooner",
    "temporaries": "use smaller microbatches",
    "other": "use smaller batches",
}


def fits_memory(timeline: Timeline, cluster: Cluster) -> bool:
    """Whether every device has the memory that it needs; see `check_memory`."""
    return not any(lacking_bytes(timeline, cluster))


def lacking_bytes(timeline: Timeline, cluster: Cluster) -> list[int]:
    """Return the bytes that every device needs beyond its memory; 0 if it has enough."""
    return [
        0 if device.memory_bytes is None else max(0, curve.peak_bytes - device.memory_bytes)
        for curve, device in zip(timeline.memory, cluster.devices, strict=False)
    ]


def check_memory(timeline: Timeline, cluster: Cluster) -> None:
    """Check that every device has the memory that it needs; one without a limit has.

    Raises:
        ValueError: a device needs more than it has; says when, what most of it is, and what to
            change. Or the timeline says nothing of memory, or the cluster has fewer devices.
    """
    if not timeline.memory:
        raise ValueError("the timeline says nothing of memory; use one that `simulate` returned")
    if len(cluster.devices) < len(timeline.memory):
        raise ValueError(
            f"the timeline has {len(timeline.memory)} devices, but the cluster "
            f"{len(cluster.devices)}; describe each device of the timeline"
        )
    for index, (curve, device) in enumerate(zip(timeline.memory, cluster.devices, strict=False)):
        if device.memory_bytes is not None and curve.peak_bytes > device.memory_bytes:
            part, part_bytes = max(curve.peak_parts.items(), key=lambda each: each[1])
            raise ValueError(
                f"device {index} needs {curve.peak_bytes:,} bytes {curve.peak_s * 1e3:.3f} ms into "
                f"the step, but has {device.memory_bytes:,}; most of it, {part_bytes:,} bytes, is "
                f"{part}: {_REMEDIES[part]}"
            )
