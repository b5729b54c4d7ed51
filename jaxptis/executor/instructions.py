"""What each device does in a step: a list of instructions on named buffers.

A buffer's name is the same on every device that holds it. Names, on the device of the reader:

    param3  sum3.device1  a parameter, and the sum of its gradients so far on a device
    batch0  microbatch2   a leaf of the batch, and the index of a microbatch
    stage1.constant0      an array that the loss function closes over
    x4.2                  crossing 4 of microbatch 2
    d4.stage3.2           its gradient, as stage 3 sees it
    stage1.saved0.2       what a forward saves for its backward
    result0.2  result0    the loss (1, 2, ...: auxiliary leaves) of microbatch 2, and of the step
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from jaxptis.plan import Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a program; `task` says which task of the plan that is, if it is one."""

    program: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    task: Task | None = None

    def __str__(self) -> str:
        return f"{self.program}({', '.join(self.reads)}) -> {', '.join(self.writes)}"


@dataclass(frozen=True, kw_only=True)
class Send:
    """Send a buffer; waits until the other device receives it."""

    buffer: str
    target: int
    reads = property(lambda self: (self.buffer,))
    writes = ()

    def __str__(self) -> str:
        return f"send {self.buffer} to device {self.target}"


@dataclass(frozen=True, kw_only=True)
class Receive:
    """Receive a buffer; waits until the other device sends it."""

    buffer: str
    source: int
    reads = ()
    writes = property(lambda self: (self.buffer,))

    def __str__(self) -> str:
        return f"receive {self.buffer} from device {self.source}"


Instruction = Run | Send | Receive


@dataclass(frozen=True, kw_only=True)
class Step:
    """An instruction and the device that carries it out; a transfer is the step of its sender.

    Attributes:
      device: where it runs.
      instruction: what runs.
      frees: the buffers of this device that nothing reads afterwards.
    """

    device: int
    instruction: Run | Send
    frees: tuple[str, ...]

    @property
    def consumes(self) -> tuple[str, ...]:
        """The buffers whose present value nothing reads afterwards."""
        gone = {*self.frees, *self.instruction.writes}
        return tuple(name for name in self.instruction.reads if name in gone)


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
        """Append a transfer to both lists, so that they agree on the order."""
        self.rows[source].append(Send(buffer=buffer, target=target))
        self.rows[target].append(Receive(buffer=buffer, source=source))

    def text(self) -> str:
        """Return the lists, a line an instruction."""
        return "\n".join(
            "\n".join([f"device {device}", *(f"  {each}" for each in row), ""])
            for device, row in enumerate(self.rows)
        )


def in_one_order(rows: Rows, held: Sequence[Container[str]]) -> tuple[Step, ...]:
    """Return the steps of all devices in an order in which one process can carry them out.

    Devices take turns; a device that sends or receives waits until the other end is there.

    Args:
      rows: the lists.
      held: for each device the buffers that outlive the step.

    Raises:
      ValueError: the transfers wait for each other.
    """
    frees = [_last_reads(row, kept) for row, kept in zip(rows.rows, held, strict=True)]
    position = [0] * len(rows.rows)
    steps: list[Step] = []

    def head(device: int) -> Instruction | None:
        row = rows.rows[device]
        return row[position[device]] if position[device] < len(row) else None

    def advance(device: int) -> bool:
        instruction = head(device)
        if instruction is None or isinstance(instruction, Receive):
            return False
        if isinstance(instruction, Send):
            if head(instruction.target) != Receive(buffer=instruction.buffer, source=device):
                return False
            position[instruction.target] += 1
        steps.append(
            Step(
                device=device,
                instruction=instruction,
                frees=frees[device][position[device]],
            )
        )
        position[device] += 1
        return True

    devices = range(len(rows.rows))
    while sum(advance(device) for device in devices):
        pass
    stuck = [f"device {d} at {head(d)}" for d in devices if head(d) is not None]
    if stuck:
        raise ValueError(f"the transfers wait for each other: {'; '.join(stuck)}")
    return tuple(steps)


def _last_reads(row: Sequence[Instruction], held: Container[str]) -> list[tuple[str, ...]]:
    """Return, for each instruction, the buffers that it touches and nothing after it reads."""
    read_later: set[str] = set()
    frees = []
    for instruction in reversed(row):
        touched = dict.fromkeys((*instruction.reads, *instruction.writes))
        frees.append(tuple(n for n in touched if n not in held and n not in read_later))
        read_later.difference_update(instruction.writes)
        read_later.update(instruction.reads)
    return frees[::-1]
