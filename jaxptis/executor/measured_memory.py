"""The memory of every device over the time of a step as it was run.

What is counted is what the lists were proven with, and what programs need inside. A device holds
the results of an instruction, and its temporaries, from the start of the instruction on; what it
frees, until its end.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf
from operator import attrgetter
from typing import NamedTuple

from jaxptis.executor.account import Account
from jaxptis.executor.instructions import Instruction, Rows
from jaxptis.executor.measured import Happenings, of_tasks
from jaxptis.performance.memory import MemoryCurve


def measured_memory(
    rows: Rows, happenings: Happenings, accounts: Sequence[Account]
) -> tuple[MemoryCurve, ...]:
    """Return the memory of every device from the start of the first task to the end of the last.

    What an update needs after that is not in it.

    Args:
        rows: the instruction lists.
        happenings: when each of them was run, on one clock.
        accounts: what each device holds over its list.
    """
    tasks = [at for row in of_tasks(rows, happenings) for _, at in row]
    begin_s, end_s = min(at.start_s for at in tasks), max(at.end_s for at in tasks)
    return tuple(
        _curve(row, account, list(_moments(device, happenings, account)), begin_s, end_s)
        for device, (row, account) in enumerate(zip(rows.rows, accounts, strict=True))
    )


class _Moment(NamedTuple):
    """What a device holds from a moment on: while an instruction runs, or after it."""

    time_s: float
    num_bytes: int
    position: int
    runs: bool


def _moments(device: int, happenings: Happenings, account: Account) -> Iterator[_Moment]:
    yield _Moment(-inf, account.given_bytes, -1, False)
    for position, (during, after) in enumerate(account.levels()):
        at = happenings[device, position]
        yield _Moment(at.start_s, during, position, True)
        yield _Moment(at.end_s, after, position, False)


def _curve(
    row: Sequence[Instruction],
    account: Account,
    moments: Sequence[_Moment],
    begin_s: float,
    end_s: float,
) -> MemoryCurve:
    """Cut out what is between two moments; the first is 0."""
    begun = sum(each.time_s <= begin_s for each in moments)
    first, *later = moments[begun - 1 :]
    steps = [first._replace(time_s=begin_s)]
    steps += (
        each
        for last, each in pairwise([first, *later])
        if each.time_s <= end_s and each.num_bytes != last.num_bytes
    )
    peak = max(steps, key=attrgetter("num_bytes"))
    return MemoryCurve(
        times_s=tuple(each.time_s - begin_s for each in steps),
        num_bytes=tuple(each.num_bytes for each in steps),
        peak_parts=account.parts(row, peak.position, runs=peak.runs),
    )
