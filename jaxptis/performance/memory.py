"""The memory of every device over the time of a step, and whether a cluster has as much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxptis.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class MemoryCurve:
    """The bytes that a device holds, as steps over time.

    Attributes:
        times_s: from the start of the step, ascending; the first is 0.
        num_bytes: from each of these times to the next.
        peak_parts: what there is at the peak, in bytes, by what it is: "parameters", "gradients",
            "optimizer state", "saved", "kept", "transfers" and "temporaries".
    """

    times_s: tuple[float, ...]
    num_bytes: tuple[int, ...]
    peak_parts: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        """The most bytes at once."""
        return max(self.num_bytes)

    @property
    def peak_s(self) -> float:
        """When there are that many for the first time."""
        return self.times_s[self.num_bytes.index(self.peak_bytes)]


_REMEDIES = {
    "parameters": "give it fewer layers",
    "gradients": "give it fewer layers",
    "optimizer state": "give it fewer layers",
    "saved": "let its stages recompute more, or keep fewer microbatches in flight",
    "kept": "run its weight gradients sooner, or its backwards whole",
    "transfers": "run the tasks that read what crosses sooner",
    "temporaries": "use smaller microbatches",
}


def check_memory(curves: Sequence[MemoryCurve], cluster: Cluster) -> None:
    """Check that every device has the memory that it needs.

    Args:
        curves: of every device in order, such as `Timeline.memory`.
        cluster: the devices.

    Raises:
        ValueError: a device needs more than it has; says when, what takes most of it, and what to
            change.
    """
    for index, (curve, device) in enumerate(zip(curves, cluster.devices, strict=False)):
        if device.memory_bytes is None or curve.peak_bytes <= device.memory_bytes:
            continue
        part, part_bytes = max(curve.peak_parts.items(), key=lambda each: each[1])
        raise ValueError(
            f"device {index} needs {curve.peak_bytes:,} bytes {curve.peak_s * 1e3:.3f} ms into the "
            f"step, but has {device.memory_bytes:,}; most of it, {part_bytes:,} bytes, is "
            f"{part}: {_REMEDIES[part]}"
        )
