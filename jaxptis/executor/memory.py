"""Predict, from instruction lists alone, the most bytes that are live at once on each device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxptis.executor.instructions import Instruction, Rows, Run


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of one device during a step.

    Attributes:
        resident_bytes: what lasts: parameters, sums of gradients, the batch, constants.
        peak_bytes: the most that is live at once, what lasts and temporaries inside of programs
            included.
        temporary_bytes: how much of the peak is inside of the program that runs then; 0 where
            programs are not compiled.
    """

    resident_bytes: int
    peak_bytes: int
    temporary_bytes: int = 0


def predict_memory(
    rows: Rows, nbytes: Mapping[str, int], resident: Sequence[int]
) -> tuple[DeviceMemory, ...]:
    """Walk the list of each device in order.

    A buffer lives from the first instruction on the device that uses it to the last; what a program
    makes takes the memory of what dies there, if their sizes are equal. What is neither read nor
    sent stays until the end.

    Args:
        rows: the lists.
        nbytes: the size of each buffer that does not last, by its name.
        resident: for each device the bytes that last.
    """
    return tuple(
        DeviceMemory(resident_bytes=lasting, peak_bytes=lasting + _peak_in_flight(row, nbytes))
        for row, lasting in zip(rows.rows, resident, strict=True)
    )


def _peak_in_flight(row: Sequence[Instruction], nbytes: Mapping[str, int]) -> int:
    """Return the most bytes at once of buffers that do not last."""
    last_read = {name: k for k, each in enumerate(row) for name in each.reads}
    live: dict[str, int] = {}
    peak = 0
    for k, each in enumerate(row):
        reads, made = (
            {name: nbytes[name] for name in names if name in nbytes}
            for names in (each.reads, each.writes)
        )
        live |= reads
        peak = max(peak, sum(live.values()))
        dying = {name: size for name, size in reads.items() if last_read[name] == k}
        same = Counter(dying.values()) & Counter(made.values())
        live |= made
        reused = sum(same.elements()) if isinstance(each, Run) else 0
        peak = max(peak, sum(live.values()) - reused)
        for name in dying:
            del live[name]
    return peak
