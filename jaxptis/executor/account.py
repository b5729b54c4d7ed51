"""What a device holds over its instruction list: how much, and what it is."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxptis.executor.instructions import Instruction, Run
from jaxptis.plan import Task

PARTS = {
    "param": "parameters",
    "sum": "gradients",
    "state": "optimizer state",
    "saved": "saved",
    "kept": "kept",
    "d": "transfers",
}
"""By what the names of buffers begin with; see `jaxptis.executor.tasks`."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an instruction changes of what its device holds.

    Attributes:
        comes: buffers that are there from its start on.
        taken: buffers whose memory its results take; from its start on they are not there.
        goes: buffers that are there until its end.
    """

    comes: tuple[str, ...]
    taken: tuple[str, ...]
    goes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a device holds.

    Attributes:
        given: the buffers that are there at the start.
        changes: of each instruction of its list.
        temporary_bytes: what each instruction needs inside of its program.
        num_bytes: of each buffer.
    """

    given: frozenset[str]
    changes: tuple[Change, ...]
    temporary_bytes: tuple[int, ...]
    num_bytes: Mapping[str, int]

    @property
    def given_bytes(self) -> int:
        """The bytes that are there at the start."""
        return self._size(self.given)

    @property
    def peak_bytes(self) -> int:
        """The most bytes at once."""
        return max([self.given_bytes, *(during for during, _ in self.levels())])

    @property
    def peak_temporary_bytes(self) -> int:
        """How many of them are inside of the program that runs then."""
        most = [*self.levels(), (self.given_bytes, 0)]
        peak = max(range(len(most)), key=lambda position: most[position][0])
        return (*self.temporary_bytes, 0)[peak]

    def levels(self) -> Iterator[tuple[int, int]]:
        """Yield the bytes that are there while each instruction runs, and after it."""
        total = self.given_bytes
        for change, temporary in zip(self.changes, self.temporary_bytes, strict=True):
            total += self._size(change.comes) - self._size(change.taken)
            yield total + temporary, total - self._size(change.goes)
            total -= self._size(change.goes)

    def parts(self, row: Sequence[Instruction], position: int, *, runs: bool) -> dict[str, int]:
        """Return the bytes by what they are, in the words of `MemoryCurve`.

        Args:
            row: the list.
            position: of an instruction, or -1 for the start.
            runs: whether that is while the instruction runs, or after it.
        """
        live, done = set(self.given), position + (not runs)
        for number, change in enumerate(self.changes[: position + 1]):
            live = live.union(change.comes).difference(change.taken)
            live.difference_update(change.goes if number < done else ())
        kept = _kept(row[:done], row)
        read = {name for each, _ in _tasks(row) for name in each.reads}
        parts = dict.fromkeys((*PARTS.values(), "temporaries", "other"), 0)
        parts["temporaries"] = self.temporary_bytes[position] if runs else 0
        for name in live:
            parts[_part_of(name, kept, read)] += self.num_bytes[name]
        return parts

    def _size(self, names: Iterable[str]) -> int:
        return sum(self.num_bytes[name] for name in names)


def _tasks(row: Sequence[Instruction]) -> Iterator[tuple[Run, Task]]:
    return ((each, each.task) for each in row if isinstance(each, Run) and each.task is not None)


def _kept(done: Sequence[Instruction], row: Sequence[Instruction]) -> set[str]:
    """Return what is read by each W whose I is done."""
    split = {(task.stage, task.microbatch) for _, task in _tasks(done) if task.kind == "I"}
    return {
        name
        for each, task in _tasks(row)
        if task.kind == "W" and (task.stage, task.microbatch) in split
        for name in each.reads
    }


def _part_of(name: str, kept: set[str], read: set[str]) -> str:
    """Say what a buffer is.

    Args:
        name: of the buffer.
        kept: what lasts from I to W.
        read: what tasks of the device read; what else crosses is on its way to another.
    """
    match = re.match(r"(?:stage\d+\.)?([a-z_]+)", name)
    first = match[1] if match else ""
    if name in kept and first in ("saved", "x", "d"):
        return "kept"
    if first == "x":
        return "saved" if name in read else "transfers"
    return PARTS.get(first, "other")
