"""A step that is ready to run: compiled programs, and slots for the buffers they pass on."""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxptis.executor.compiled import CompiledProgram, Compiler, donations
from jaxptis.executor.instructions import Rows, Run, Step, in_one_order
from jaxptis.executor.programs import Aval, ProgramSpec
from jaxptis.executor.transfer import Transfer

Buffer = tuple[int, str]  # a device and the name of a buffer there


@dataclass(frozen=True)
class _Op:
    call: Callable[..., Sequence[Any]]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]


class Executable:
    """Runs the instruction lists of all devices from one process.

    Everything is compiled and looked up when it is made. A call walks a flat list: take the inputs
    out of their slots, call the program, put the results into theirs, drop what is not read again.
    """

    def __init__(
        self,
        compiler: Compiler,
        *,
        rows: Rows,
        specs: Mapping[str, ProgramSpec],
        inputs: Mapping[Buffer, Aval],
        outputs: Sequence[Buffer],
        constants: Mapping[Buffer, Any],
        consumed: Sequence[Buffer] = (),
    ) -> None:
        """Compile `rows`.

        Args:
          compiler: for the devices that the rows are written for.
          rows: the instruction lists.
          specs: the programs that they name.
          inputs: what the caller passes, in order.
          outputs: what the caller is given, in order.
          constants: inputs with a value that stays the same.
          consumed: inputs that the step may overwrite or free.
        """
        self.rows = rows
        kept = {*inputs, *constants}.difference(consumed) | set(outputs)
        held = [{name for d, name in kept if d == device} for device in range(len(rows.rows))]
        steps = in_one_order(rows, held)
        transfers = _typed_transfers(steps, specs, inputs, constants)
        self.programs = compiler.programs(specs, _donated(steps, specs))
        self.transfers = compiler.transfers(list(transfers.values()))
        slots: dict[Buffer, int] = collections.defaultdict(lambda: len(slots))
        self._inputs = [slots[buffer] for buffer in inputs]
        self._ops = [
            _bind(step, slots, self.programs, self.transfers, transfers.get(i))
            for i, step in enumerate(steps)
        ]
        self._outputs = [slots[buffer] for buffer in outputs]
        self._blank: list[Any] = [None] * len(slots)
        for buffer, value in constants.items():
            if buffer in slots:
                self._blank[slots[buffer]] = value
        self.num_tasks = sum(
            isinstance(s.instruction, Run) and s.instruction.task is not None for s in steps
        )
        self.host_s = 0.0
        self.num_calls = 0

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the step; returns as soon as everything is issued."""
        start_s = time.perf_counter()
        slots = self._blank.copy()
        for slot, value in zip(self._inputs, inputs, strict=True):
            slots[slot] = value
        for op in self._ops:
            results = op.call(*[slots[slot] for slot in op.reads])
            for slot, value in zip(op.writes, results, strict=True):
                slots[slot] = value
            for slot in op.frees:
                slots[slot] = None
        self.host_s += time.perf_counter() - start_s
        self.num_calls += 1
        return [slots[slot] for slot in self._outputs]


def _typed_transfers(
    steps: Sequence[Step],
    specs: Mapping[str, ProgramSpec],
    inputs: Mapping[Buffer, Aval],
    constants: Mapping[Buffer, Any],
) -> dict[int, tuple[int, int, Aval]]:
    """Follow the types of the buffers through the steps, checking those that programs read.

    Returns:
      For each step that is a transfer its source, target and type.
    """
    buffers = dict(inputs)
    buffers.update({b: Aval(x.shape, x.dtype) for b, x in constants.items()})
    transfers = {}
    for i, step in enumerate(steps):
        instruction = step.instruction
        if isinstance(instruction, Run):
            spec = specs[instruction.program]
            types = [_plain(buffers[step.device, name]) for name in instruction.reads]
            assert types == [_plain(a) for a in spec.in_avals], (instruction, types, spec.in_avals)
            for name, aval in zip(instruction.writes, spec.out_avals, strict=True):
                buffers[step.device, name] = aval
        else:
            aval = buffers[step.device, instruction.buffer]
            buffers[instruction.target, instruction.buffer] = aval
            key = Aval(aval.shape, aval.dtype)
            transfers[i] = (step.device, instruction.target, key)
    return transfers


def _plain(aval: Aval) -> tuple[Any, ...]:
    return tuple(aval.shape), aval.dtype


def _donated(steps: Sequence[Step], specs: Mapping[str, ProgramSpec]) -> dict[str, tuple[int, ...]]:
    """Return the inputs that each program may overwrite: no call's input is read again."""
    consumed: dict[str, set[int]] = {}
    for step in steps:
        if isinstance(step.instruction, Run):
            reads, gone = step.instruction.reads, step.consumes
            once = {i for i, n in enumerate(reads) if n in gone and reads.count(n) == 1}
            consumed.setdefault(step.instruction.program, once).intersection_update(once)
    return {name: donations(spec, sorted(consumed[name])) for name, spec in specs.items()}


def _bind(
    step: Step,
    slots: dict[Buffer, int],
    programs: Mapping[str, CompiledProgram],
    transfers: Mapping[tuple[int, int, Aval], Transfer],
    key: tuple[int, int, Aval] | None,
) -> _Op:
    """Look up what a step calls (with `key`, the transfer) and the slots it works on."""
    instruction = step.instruction
    call: Callable[..., Sequence[Any]]
    if isinstance(instruction, Run):
        call = programs[instruction.program].compiled
        written = [(step.device, name) for name in instruction.writes]
    else:
        assert key is not None
        call = transfers[key]
        written = [(instruction.target, instruction.buffer)]
    return _Op(
        call=call,
        reads=tuple(slots[step.device, name] for name in instruction.reads),
        writes=tuple(slots[buffer] for buffer in written),
        frees=tuple(slots[step.device, name] for name in step.frees),
    )
