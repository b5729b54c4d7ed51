"""Predict, from a plan alone, the most bytes that are live at once on each device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxptis.executor.tasks import TaskPrograms
from jaxptis.plan import Plan, Task


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
    plan: Plan, programs: TaskPrograms, nbytes: Mapping[str, int], resident: Sequence[int]
) -> tuple[DeviceMemory, ...]:
    """Walk the tasks of each device in order.

    A buffer of a microbatch lives from the first task on the device that uses it to the last; what
    is made takes the memory of what dies in the same task, if their sizes are equal. What arrives
    from another device arrives for its first reader, when what the task before sends has not left
    yet. A result that no task reads and that is not sent stays until the end of the step.

    Args:
        plan: the plan.
        programs: what its tasks run.
        nbytes: the size of each buffer, by the name of its `Ref`.
        resident: for each device the bytes that last.
    """
    return tuple(
        DeviceMemory(
            resident_bytes=lasting,
            peak_bytes=lasting + _peak_in_flight(plan.schedule[device], programs, nbytes),
        )
        for device, lasting in enumerate(resident)
    )


def _peak_in_flight(row: Sequence[Task], programs: TaskPrograms, nbytes: Mapping[str, int]) -> int:
    """Return the most bytes of microbatches that are live at once on a device."""
    tasks = [
        (programs[task.stage, task.kind], task.microbatch)
        for task in row
        if (task.stage, task.kind) in programs
    ]
    last_read = {ref.of(m): k for k, (program, m) in enumerate(tasks) for ref in program.reads}
    live: dict[str, int] = {}
    leaving: set[str] = set()
    peak = 0
    for k, (program, m) in enumerate(tasks):
        reads, made = (
            {ref.of(m): nbytes[ref.name] for ref in refs if ref.per_microbatch}
            for refs in (program.reads, program.writes)
        )
        live |= reads
        peak = max(peak, sum(live.values()))
        for name in leaving:
            del live[name]
        dying = {name: size for name, size in reads.items() if last_read[name] == k}
        reused = (Counter(dying.values()) & Counter(made.values())).elements()
        live |= made
        peak = max(peak, sum(live.values()) - sum(reused))
        for name in dying:
            del live[name]
        leaving = {name for ref, _ in program.sends if (name := ref.of(m)) not in last_read}
    return peak
