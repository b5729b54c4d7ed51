"""Prove, before anything runs, that instruction lists can be carried out.

The lists are walked with transfers that block both ends. That shows that no device waits forever,
that every buffer is there when it is read and is freed once, and how many bytes are live.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType

from jaxptis.executor.account import Account, Change
from jaxptis.executor.instructions import Instruction, Rows, Run, Transfer
from jaxptis.plan import Task


@dataclass(frozen=True)
class Step:
    """A program on its device, or a transfer on both.

    Attributes:
        ends: each device with its instruction.
        positions: of these in the lists of the devices.
    """

    ends: tuple[tuple[int, Instruction], ...]
    positions: tuple[int, ...]


def in_one_order(rows: Rows) -> tuple[Step, ...]:
    """Return all instructions in an order in which one process can carry them out.

    Devices take turns; a device that transfers waits until the other end is there.

    Raises:
        ValueError: devices wait for each other, or for a transfer that never comes.
    """
    position = [0] * len(rows.rows)
    steps: list[Step] = []

    def head(device: int) -> Instruction | None:
        row = rows.rows[device]
        return row[position[device]] if position[device] < len(row) else None

    def advance(device: int) -> bool:
        instruction = head(device)
        if instruction is None:
            return False
        ends = {device: instruction}
        if isinstance(instruction, Transfer):
            other = head(instruction.peer)
            if other is None or not instruction.matches(device, other):
                return False
            ends[instruction.peer] = other
        devices = sorted(ends)
        steps.append(
            Step(
                ends=tuple((end, ends[end]) for end in devices),
                positions=tuple(position[end] for end in devices),
            )
        )
        for end in devices:
            position[end] += 1
        return True

    devices = range(len(rows.rows))
    while sum(advance(device) for device in devices):
        pass
    heads = [head(device) for device in devices]
    if any(heads):
        raise ValueError(_deadlock(heads))
    return tuple(steps)


def _deadlock(heads: Sequence[Instruction | None]) -> str:
    """Name the circle of devices, or the device that waits for one that is done."""
    device = next(d for d, instruction in enumerate(heads) if instruction is not None)
    path: list[int] = []
    while device not in path:
        path.append(device)
        waiting = heads[device]
        assert isinstance(waiting, Transfer), f"device {device} could run {waiting}"
        if heads[waiting.peer] is None:
            return (
                f"device {device} waits forever to {waiting}: device {waiting.peer} has no such "
                "transfer left"
            )
        device = waiting.peer
    circle = path[path.index(device) :]
    steps = (f"device {each} waits to {heads[each]}" for each in circle)
    return f"deadlock, the transfers wait for each other: {'; '.join(steps)}"


def prove(
    rows: Rows,
    *,
    given: Sequence[Set[str]],
    held: Sequence[Set[str]],
    nbytes: Mapping[str, int],
    donated: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> tuple[Account, ...]:
    """Check the lists, buffer by buffer.

    Args:
        rows: the lists, with frees.
        given: for each device the buffers that are there at the start.
        held: for each device those that must be there at the end, and nothing else.
        nbytes: the size of each buffer.
        donated: for each program the positions of inputs whose memory its results take.

    Returns:
        For each device what it holds; of what its programs need inside nothing is known.

    Raises:
        ValueError: says what is wrong, with the device, the instruction and the buffer.
    """
    devices = [_Memory(device, buffers, nbytes) for device, buffers in enumerate(given)]
    done: set[Task] = set()
    for step in in_one_order(rows):
        for device, instruction in step.ends:
            if isinstance(instruction, Run) and instruction.task is not None:
                if instruction.task in done:
                    raise ValueError(f"device {device} runs {instruction.task} twice")
                done.add(instruction.task)
            reused = donated.get(instruction.program, ()) if isinstance(instruction, Run) else ()
            devices[device].carry_out(instruction, [instruction.reads[i] for i in reused])
    for memory, kept in zip(devices, held, strict=True):
        memory.finish(kept)
    return tuple(memory.account() for memory in devices)


class _Memory:
    """The live buffers of a device."""

    def __init__(self, device: int, given: Set[str], nbytes: Mapping[str, int]) -> None:
        self._device = device
        self._nbytes = nbytes
        self._given = frozenset(given)
        self._live = set(given)
        self._freed: set[str] = set()
        self._changes: list[Change] = []

    def carry_out(self, instruction: Instruction, donated: Sequence[str]) -> None:
        """Read, write and free; results take the memory of what is `donated`."""
        here = f"device {self._device} at '{instruction}'"
        for name in instruction.reads:
            if name not in self._live:
                why = "was freed before" if name in self._freed else "was never made"
                raise ValueError(f"{here}: {name} is read, but {why}")
        for name in instruction.writes:
            if name in self._live and name not in instruction.reads:
                raise ValueError(f"{here}: {name} is written while it is still in use")
        made = [name for name in dict.fromkeys(instruction.writes) if name not in self._live]
        self._live.update(made)
        taken = {name for name in donated if name not in instruction.writes}
        for name in instruction.frees:
            if name not in self._live:
                raise ValueError(f"{here}: {name} is freed, but is not there")
            self._live.discard(name)
            self._freed.add(name)
        goes = tuple(name for name in instruction.frees if name not in taken)
        self._changes.append(Change(comes=tuple(made), taken=tuple(sorted(taken)), goes=goes))

    def account(self) -> Account:
        """Return what was carried out."""
        return Account(
            given=self._given,
            changes=tuple(self._changes),
            temporary_bytes=(0,) * len(self._changes),
            num_bytes=self._nbytes,
        )

    def finish(self, held: Set[str]) -> None:
        """Check that what is to outlive the step is there, and nothing else."""
        for what, names in ("never freed", self._live - held), ("missing", held - self._live):
            if names:
                raise ValueError(
                    f"device {self._device} ends with {', '.join(sorted(names))} {what}"
                )
