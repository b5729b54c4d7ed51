"""What each device does in a step: a list of instructions on named buffers (see `tasks`)."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from jaxptis.plan import Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a program.

    Attributes:
        program: its name.
        reads: its inputs.
        writes: its results; one that is also read is replaced.
        frees: what nothing on this device reads afterwards.
        task: the task of the plan that this is, if it is one.
    """

    program: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...] = ()
    task: Task | None = None

    def __str__(self) -> str:
        return f"{self.program}({', '.join(self.reads)}) -> {', '.join(self.writes)}"

    @property
    def consumes(self) -> tuple[str, ...]:
        """The inputs whose present value nothing reads afterwards."""
        gone = {*self.frees, *self.writes}
        return tuple(name for name in self.reads if name in gone)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Exchange buffers with another device, in one program of both; each waits for the other.

    Attributes:
        peer: the other device.
        sends: buffers of this device that the peer is given.
        receives: buffers that this device is given.
        frees: what nothing on this device reads afterwards.
    """

    peer: int
    sends: tuple[str, ...]
    receives: tuple[str, ...]
    frees: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return self.sends

    @property
    def writes(self) -> tuple[str, ...]:
        return self.receives

    def __str__(self) -> str:
        sent = [f"send {name} to device {self.peer}" for name in self.sends]
        received = [f"receive {name} from device {self.peer}" for name in self.receives]
        return " & ".join([*sent, *received])

    def matches(self, device: int, other: "Instruction") -> bool:
        """Whether `other`, of the peer, is the other end of this transfer of `device`."""
        return (
            isinstance(other, Transfer)
            and other.peer == device
            and (other.sends, other.receives) == (self.receives, self.sends)
        )


Instruction = Run | Transfer


class Rows:
    """The instruction lists of all devices, while they are being written."""

    def __init__(self, num_devices: int) -> None:
        self.rows: list[list[Instruction]] = [[] for _ in range(num_devices)]

    def run(
        self,
        device: int,
        program: str,
        reads: Sequence[str],
        writes: Sequence[str],
        task: Task | None = None,
    ) -> None:
        """Append a program to the list of `device`."""
        instruction = Run(program=program, reads=tuple(reads), writes=tuple(writes), task=task)
        self.rows[device].append(instruction)

    def transfer(self, source: int, target: int, buffer: str) -> None:
        """Append a transfer to both lists, so that they agree on the order.

        Where it follows one between the same devices at both ends, the two become one.
        """
        sent, received = self.rows[source], self.rows[target]
        last = sent[-1] if sent else None
        if (
            received
            and isinstance(last, Transfer)
            and last.peer == target
            and last.matches(source, received[-1])
        ):
            here, there = sent.pop(), received.pop()
            assert isinstance(here, Transfer) and isinstance(there, Transfer)
        else:
            here = Transfer(peer=target, sends=(), receives=())
            there = Transfer(peer=source, sends=(), receives=())
        sent.append(replace(here, sends=(*here.sends, buffer)))
        received.append(replace(there, receives=(*there.receives, buffer)))

    def free(self, held: Sequence[Set[str]]) -> "Rows":
        """Return the lists with every buffer freed after its last use.

        Args:
            held: for each device the buffers that outlive the step.
        """
        freed = Rows(len(self.rows))
        freed.rows = [_free(row, kept) for row, kept in zip(self.rows, held, strict=True)]
        return freed

    def text(self) -> str:
        """Return the lists, a line an instruction."""
        return "\n".join(
            "\n".join([f"device {device}", *map(_line, row), ""])
            for device, row in enumerate(self.rows)
        )


def _line(instruction: Instruction) -> str:
    freed = f"  (frees {', '.join(instruction.frees)})" if instruction.frees else ""
    return f"  {instruction}{freed}"


def _free(row: Sequence[Instruction], held: Set[str]) -> list[Instruction]:
    """Let each instruction free what it touches and nothing after it reads."""
    read_later: set[str] = set()
    freed: list[Instruction] = []
    for instruction in reversed(row):
        touched = dict.fromkeys((*instruction.reads, *instruction.writes))
        frees = tuple(n for n in touched if n not in held and n not in read_later)
        freed.append(replace(instruction, frees=frees))
        read_later.difference_update(instruction.writes)
        read_later.update(instruction.reads)
    return freed[::-1]
