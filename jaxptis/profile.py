"""The timeline of a step as it was run, and what it cost to record it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxptis.executor.executable import Executable
from jaxptis.executor.measured import on_one_clock, timeline_of
from jaxptis.executor.measured_memory import measured_memory
from jaxptis.executor.record import Happening
from jaxptis.performance import Timeline


class ProfileError(ValueError):
    """Steps were taken, but nothing came of measuring them.

    Attributes:
        state: after the steps, to go on with.
    """

    def __init__(self, message: str, state: Any) -> None:
        super().__init__(message)
        self.state = state


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a step did, measured.

    Attributes:
        timeline: of the step of median length, from its first task to its last.
        recorded_s: for every recorded step, how long it took with its update, by the clock of this
            process.
        plain_s: likewise, of as many steps in between that were not recorded.
        clock_error_s: how far the clocks of processes may be apart in the timeline at most.
    """

    timeline: Timeline
    recorded_s: tuple[float, ...]
    plain_s: tuple[float, ...]
    clock_error_s: float

    @property
    def cost(self) -> float:
        """How much longer a recorded step takes, as a fraction of one that is not."""
        return statistics.median(self.recorded_s) / statistics.median(self.plain_s) - 1

    def text(self) -> str:
        """Return the timeline, and what it cost to record it."""
        return (
            f"{self.timeline.text()}\n{len(self.recorded_s)} steps were recorded, each "
            f"{statistics.median(self.recorded_s) * 1e3:.3f} ms with the update, "
            f"{self.cost:+.1%} beside as many that were not; clocks are within "
            f"{self.clock_error_s * 1e6:.0f} us of each other\n"
        )

    def __str__(self) -> str:
        return self.text()


def measured_timeline(
    executable: Executable, devices: Sequence[jax.Device], happenings: Sequence[Happening]
) -> tuple[Timeline, float]:
    """Return what the pipeline's devices did, and how far clocks may be apart at most.

    Args:
        executable: that was recorded.
        devices: of the pipeline.
        happenings: what was recorded of the devices of this process.
    """
    processes = [device.process_index for device in devices]
    if len(set(processes)) > 1:  # then it has devices of every process
        happenings = _of_all_processes(happenings)
    else:
        processes = [0] * len(devices)  # one clock
    every, error_s = on_one_clock(executable.rows, processes, happenings)
    timeline = timeline_of(executable.rows, every, executable.num_bytes)
    memory = measured_memory(executable.rows, every, executable.accounts)
    return replace(timeline, memory=memory), error_s


def _of_all_processes(happenings: Sequence[Happening]) -> list[Happening]:
    """Return what was recorded in all processes, each on a clock of its own.

    Sent as whole microseconds since the first of each: 32 bits have room for half an hour.
    """
    begin_s = min(each.start_s for each in happenings)
    own = [
        (each.device, each.position, *_microseconds(each.start_s - begin_s, each.end_s - begin_s))
        for each in happenings
    ]
    count = int(multihost_utils.process_allgather(np.int32(len(own))).max())
    padded = np.full((count, 4), -1, np.int32)
    padded[: len(own)] = own
    gathered = multihost_utils.process_allgather(padded).reshape(-1, 4)
    return [
        Happening(device=device, position=position, start_s=start * 1e-6, end_s=end * 1e-6)
        for device, position, start, end in gathered.tolist()
        if device >= 0
    ]


def _microseconds(*seconds: float) -> list[int]:
    return [round(each * 1e6) for each in seconds]
