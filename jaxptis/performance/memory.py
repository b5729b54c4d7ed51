"""The memory of every device over the time of a step."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryCurve:
    """The bytes that a device holds, as steps over time.

    Attributes:
        times_s: from the start of the step, ascending; the first is 0. Two are equal where what was
            measured lasts no time.
        num_bytes: from each of these times to the next.
        peak_parts: what there is at the peak, in bytes, by what it is: "parameters", "gradients",
            "optimizer state", "saved", "kept", "transfers" and "temporaries"; of what was measured,
            also "other": the batch, constants, results.
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
