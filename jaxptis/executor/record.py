"""Carry out a step and note when each instruction starts and ends; for GPUs see `trace`.

Each instruction is over before its device takes the next. In one process every device has a thread
of its own. On CPUs of several processes the devices of one process take turns, because there only
the order of transfers says which message is which.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Happening:
    """An instruction of a device, and the seconds on its process's clock at which it was run.

    Attributes:
        device: the device.
        position: of the instruction in the device's list.
        start_s: when it started; of a transfer, when this end was ready for it.
        end_s: when its results were there.
    """

    device: int
    position: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """An instruction, or a transfer with one end or both in this process.

    Attributes:
        ends: the devices of this process that take part, each with the position in its list.
        run: does it, and returns when the results are there.
    """

    ends: tuple[tuple[int, int], ...]
    run: Callable[[], None]


def record(jobs: Sequence[Job], *, in_turn: bool) -> list[Happening]:
    """Run jobs, which stand in an order in which one thread can run them.

    Args:
        jobs: what to run.
        in_turn: whether one thread runs all, or every device has a thread.
    """
    meetings = [_Meeting(job, 1 if in_turn else len(job.ends)) for job in jobs]
    if in_turn:
        return [happening for each in meetings for happening in each.attend()]
    devices = sorted({device for job in jobs for device, _ in job.ends})

    def walk(device: int) -> list[Happening]:
        try:
            return list(_walk(device, meetings))
        except BaseException:
            for each in meetings:
                each.abort()  # whoever waits for this device
            raise

    with ThreadPoolExecutor(max_workers=len(devices)) as pool:
        futures = [pool.submit(walk, device) for device in devices]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [happening for future in futures for happening in future.result()]


def _walk(device: int, meetings: "Sequence[_Meeting]") -> Iterator[Happening]:
    for each in meetings:
        if device in each.devices:
            yield from (it for it in each.attend() if it.device == device)


class _Meeting:
    """A job, and the threads that come to it: the last of them runs it, the others wait."""

    def __init__(self, job: Job, num_threads: int) -> None:
        self.devices = [device for device, _ in job.ends]
        self._job = job
        self._barrier = threading.Barrier(num_threads)
        self._end_s = 0.0

    def attend(self) -> list[Happening]:
        """Return when all have come and the job is done, with what that was for each end."""
        start_s = time.perf_counter()
        if self._barrier.wait() == 0:
            self._job.run()
            self._end_s = time.perf_counter()
        self._barrier.wait()
        return [
            Happening(device=device, position=position, start_s=start_s, end_s=self._end_s)
            for device, position in self._job.ends
        ]

    def abort(self) -> None:
        """Let nobody wait any longer."""
        self._barrier.abort()
