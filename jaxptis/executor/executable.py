"""A step that is ready to run: compiled programs, and slots for the buffers they pass on."""

import collections
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax

from jaxptis.executor.account import Account
from jaxptis.executor.compiled import CompiledProgram, Compiler, donations
from jaxptis.executor.instructions import Rows, Run
from jaxptis.executor.programs import Aval, ProgramSpec
from jaxptis.executor.prove import Step, in_one_order, prove
from jaxptis.executor.record import Happening, Job, record
from jaxptis.executor.regroup import regroup
from jaxptis.executor.trace import Launch, happenings_of, traced
from jaxptis.executor.transfer import Exchange, Route
from passes import jaxprs

Buffer = tuple[int, str]  # a device and the name of a buffer there


@dataclass(frozen=True)
class _Op:
    ends: tuple[tuple[int, int], ...]  # devices of this process, and positions in their lists
    module: str  # the name of the HLO module that it runs
    call: Callable[..., Sequence[Any]]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]


class Executable:
    """Runs the instruction lists of the devices of this process.

    Everything is compiled and looked up when it is made. A call walks a flat list: take the inputs
    out of their slots, call the program, put the results into theirs, drop what is not read again.

    A transfer may wait for another process, and the next one for a third. All processes take the
    instructions of all devices in one order, each leaving out those without a device of its own:
    so they never wait in a circle.
    """

    def __init__(
        self,
        compiler: Compiler,
        *,
        what: str,
        rows: Rows,
        specs: Mapping[str, ProgramSpec],
        inputs: Mapping[Buffer, Aval],
        outputs: Sequence[Buffer],
        constants: Mapping[Buffer, Any],
        consumed: Sequence[Buffer] = (),
        like: "Executable | None" = None,
    ) -> None:
        """Compile `rows`.

        Args:
          compiler: for the devices that the rows are written for.
          what: the step is called, in messages.
          rows: the instruction lists.
          specs: the programs that they name.
          inputs: what the caller passes, in order.
          outputs: what the caller is given, in order.
          constants: inputs with a value that stays the same.
          consumed: inputs that the step may overwrite or free.
          like: the same step in another order, whose programs this one runs: nothing is compiled.

        Raises:
          ValueError: this order needs other programs.
        """
        self._jax_devices = compiler.devices
        self._in_turn = jax.process_count() > 1 and compiler.devices[0].platform == "cpu"
        self._begin = functools.partial(compiler.processes.begin, what)
        compiler.processes.begin(f"compiling {what}")
        kept = {*inputs, *constants}.difference(consumed) | set(outputs)
        held = _per_device(rows, kept)
        if like is not None:
            rows = regroup(rows, like.routes, lambda device, name: _keyed(like.types[device, name]))
        self.rows = rows.free(held)
        steps = in_one_order(self.rows)
        types, routes = _types(steps, specs, inputs, constants)
        self.types: Mapping[Buffer, Aval] = types
        self.routes: tuple[Route, ...] = (
            tuple(dict.fromkeys(routes.values())) if like is None else like.routes
        )
        self.donated = _donated(steps, specs) if like is None else _same_donated(steps, like)
        read = {(d, n) for s in steps for d, each in s.ends for n in each.reads}
        self.num_bytes = {name: jaxprs.nbytes([aval]) for (_, name), aval in types.items()}
        accounts = prove(
            self.rows,
            given=_per_device(rows, {*inputs, *constants} & (read | kept)),
            held=held,
            nbytes=self.num_bytes,
            donated=self.donated,
        )
        self.peak_bytes = tuple(each.peak_bytes for each in accounts)
        compiler.processes.check_same(
            f"instructions of {what}", _text(compiler.devices, self.rows, types)
        )
        local = {device for device in range(len(rows.rows)) if compiler.is_local(device)}
        mine = [i for i, step in enumerate(steps) if not local.isdisjoint(dict(step.ends))]
        if like is None:
            self.programs = compiler.programs(specs, self.donated)
            self.exchanges = compiler.exchanges([routes[i] for i in mine if i in routes])
        else:
            self.programs, self.exchanges = like.programs, like.exchanges
        self.accounts = self._with_temporaries(compiler, accounts)
        slots: dict[Buffer, int] = collections.defaultdict(lambda: len(slots))
        self._inputs = [slots[buffer] for buffer in inputs if buffer[0] in local]
        self._input_is_local = [device in local for device, _ in inputs]
        self._ops = [
            _bind(
                steps[i],
                slots,
                local,
                self.programs,
                self.exchanges[routes[i]] if i in routes else None,
            )
            for i in mine
        ]
        self._outputs = [slots[buffer] for buffer in outputs]
        self._devices = [device for device, _ in slots]
        self._blank: list[Any] = [None] * len(slots)
        for buffer, value in constants.items():
            if buffer[0] in local:
                self._blank[slots[buffer]] = value
        for buffer in outputs:
            if buffer[0] not in local:
                self._blank[slots[buffer]] = compiler.elsewhere(buffer[0], types[buffer])
        self.num_tasks = sum(
            isinstance(each, Run) and each.task is not None
            for device in local
            for each in rows.rows[device]
        )
        self.host_s = 0.0
        self.num_calls = 0

    def _with_temporaries(
        self, compiler: Compiler, accounts: Sequence[Account]
    ) -> tuple[Account, ...]:
        """Add what programs need inside to the accounts, when all processes have compiled them."""
        own = {
            name: program.temporary_bytes
            for name, program in self.programs.items()
            if compiler.is_local(program.spec.device)
        }
        every: dict[str, int] = {}
        for told in compiler.processes.share(json.dumps(own)):
            every |= json.loads(told)
        return tuple(
            dataclasses.replace(
                account,
                temporary_bytes=tuple(
                    every[each.program] if isinstance(each, Run) else 0 for each in row
                ),
            )
            for account, row in zip(accounts, self.rows.rows, strict=True)
        )

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the step; returns as soon as everything is issued."""
        self._begin()
        start_s = time.perf_counter()
        slots = self._blank.copy()
        for slot, value in self._local(inputs):
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

    def record(self, inputs: Sequence[Any]) -> tuple[list[Any], Callable[[], list[Happening]]]:
        """Run the step; return its outputs, and what tells when each instruction was run.

        GPUs run as they do in a call, and are traced; of a trace that cannot be read a ValueError
        tells. Elsewhere each instruction is run to its end.
        """
        if self._jax_devices[0].platform == "gpu":
            return self._trace(inputs)
        self._begin()
        slots = self._blank.copy()
        for slot, value in self._local(inputs):
            slots[slot] = value
        jax.block_until_ready([value for value in slots if value is not None])
        jobs = [Job(ends=op.ends, run=functools.partial(_finish, op, slots)) for op in self._ops]
        happenings = record(jobs, in_turn=self._in_turn)
        return [slots[slot] for slot in self._outputs], lambda: happenings

    def _trace(self, inputs: Sequence[Any]) -> tuple[list[Any], Callable[[], list[Happening]]]:
        jax.block_until_ready([value for _, value in self._local(inputs)])
        outputs, kernels = traced(functools.partial(self, inputs))
        launches: dict[int, list[Launch]] = collections.defaultdict(list)
        for op in self._ops:
            for device, position in op.ends:
                launches[device].append(Launch(position, op.module, id(op.call)))
        return outputs, lambda: [
            happening
            for device, each in launches.items()
            for happening in happenings_of(
                device, each, kernels.get(self._jax_devices[device].local_hardware_id, [])
            )
        ]

    def measure_peak_bytes(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """Run the step, and return for each device the most bytes that arrays took at once.

        Those of other processes measure their own, and are 0 here.

        Counts the arrays that the step holds, whatever their number, before each instruction's
        frees; those whose memory a result has taken count no more.
        """
        held: dict[int, Any] = dict(enumerate(self._blank))
        held.update(self._local(inputs))
        peak = [0] * len(self.rows.rows)
        for op in self._ops:
            results = op.call(*[held[slot] for slot in op.reads])
            held.update(zip(op.writes, results, strict=True))
            live = [0] * len(peak)
            for slot, value in held.items():
                if value is not None and value.is_fully_addressable and not value.is_deleted():
                    live[self._devices[slot]] += value.nbytes
            peak = list(map(max, peak, live))
            held.update(dict.fromkeys(op.frees))
        return tuple(peak)

    def _local(self, inputs: Sequence[Any]) -> Iterable[tuple[int, Any]]:
        """Yield the inputs on devices of this process, each with its slot."""
        return zip(self._inputs, itertools.compress(inputs, self._input_is_local), strict=True)


def _finish(op: _Op, slots: list[Any]) -> None:
    """Run an instruction to its end, and drop what is not read again."""
    results = jax.block_until_ready(op.call(*[slots[slot] for slot in op.reads]))
    for slot, value in zip(op.writes, results, strict=True):
        slots[slot] = value
    for slot in op.frees:
        slots[slot] = None


def _per_device(rows: Rows, buffers: Iterable[Buffer]) -> list[set[str]]:
    names: list[set[str]] = [set() for _ in rows.rows]
    for device, name in buffers:
        names[device].add(name)
    return names


def _types(
    steps: Sequence[Step],
    specs: Mapping[str, ProgramSpec],
    inputs: Mapping[Buffer, Aval],
    constants: Mapping[Buffer, Any],
) -> tuple[dict[Buffer, Aval], dict[int, Route]]:
    """Follow the types of the buffers through the steps, checking those that programs read.

    Returns:
      The type of every buffer, and for each step that is a transfer its route.
    """
    types = dict(inputs)
    types.update({b: Aval(x.shape, x.dtype) for b, x in constants.items()})
    routes = {}
    for i, step in enumerate(steps):
        device, instruction = step.ends[0]
        if isinstance(instruction, Run):
            spec = specs[instruction.program]
            found = [_plain(types[device, name]) for name in instruction.reads]
            wanted = [_plain(aval) for aval in spec.in_avals]
            assert found == wanted, (instruction, found, wanted)
            written = zip(instruction.writes, spec.out_avals, strict=True)
            types.update(((device, name), aval) for name, aval in written)
            continue
        (first, here), (second, there) = step.ends
        for source, target, names in (first, second, here.reads), (second, first, there.reads):
            types.update(((target, name), types[source, name]) for name in names)
        routes[i] = Route(
            (first, second),
            (
                tuple(_keyed(types[first, name]) for name in here.reads),
                tuple(_keyed(types[second, name]) for name in there.reads),
            ),
        )
    return types, routes


def _keyed(aval: Aval) -> Aval:
    return Aval(aval.shape, aval.dtype)


def _plain(aval: Aval) -> tuple[Any, ...]:
    return tuple(aval.shape), aval.dtype


def _consumed(steps: Sequence[Step]) -> dict[str, set[int]]:
    """Return for each program that is run the inputs that no call's device reads again."""
    consumed: dict[str, set[int]] = {}
    for step in steps:
        _, instruction = step.ends[0]
        if isinstance(instruction, Run):
            reads, gone = instruction.reads, instruction.consumes
            once = {i for i, n in enumerate(reads) if n in gone and reads.count(n) == 1}
            consumed.setdefault(instruction.program, once).intersection_update(once)
    return consumed


def _donated(steps: Sequence[Step], specs: Mapping[str, ProgramSpec]) -> dict[str, tuple[int, ...]]:
    """Return the inputs that each program may overwrite."""
    consumed = _consumed(steps)
    return {name: donations(spec, sorted(consumed[name])) for name, spec in specs.items()}


def _same_donated(steps: Sequence[Step], like: Executable) -> Mapping[str, tuple[int, ...]]:
    """Return the inputs that the programs of another order overwrite, if they may in this one."""
    for name, consumed in _consumed(steps).items():
        if not consumed.issuperset(like.donated[name]):
            raise ValueError(
                f"{name} overwrites what is still read in another order; make a new trainer for it"
            )
    return like.donated


def donated_inputs(
    rows: Rows, specs: Mapping[str, ProgramSpec], kept: Iterable[Buffer]
) -> dict[str, tuple[int, ...]]:
    """Return for each program of a step the positions of the inputs that XLA may overwrite.

    Args:
      rows: the instruction lists.
      specs: the programs that they name.
      kept: the buffers that are needed when the step is over.
    """
    return _donated(in_one_order(rows.free(_per_device(rows, kept))), specs)


def _text(devices: Sequence[Any], rows: Rows, types: Mapping[Buffer, Aval]) -> str:
    buffers = (f"{buffer} {aval.dtype} {aval.shape}" for buffer, aval in types.items())
    return "\n".join([*map(str, devices), rows.text(), *buffers])


def _bind(
    step: Step,
    slots: dict[Buffer, int],
    local: Set[int],
    programs: Mapping[str, CompiledProgram],
    exchange: Exchange | None,
) -> _Op:
    """Look up what a step calls, and the slots of local devices that it works on."""
    call: Callable[..., Sequence[Any]]
    device, instruction = step.ends[0]
    if isinstance(instruction, Run):
        program = programs[instruction.program]
        call, module = program.compiled, program.spec.kind
        written = [(device, name) for name in instruction.writes]
    else:
        assert exchange is not None
        call, module = exchange, "transfer"
        # What arrives comes in the order in which it is sent, and has the same names.
        peers = [end for end, _ in reversed(step.ends)]
        written = [
            (peer, name)
            for peer, (_, each) in zip(peers, step.ends, strict=True)
            for name in each.reads
            if peer in local
        ]
    ends = [(d, each) for d, each in step.ends if d in local]
    return _Op(
        ends=tuple(
            (d, position)
            for (d, _), position in zip(step.ends, step.positions, strict=True)
            if d in local
        ),
        module=f"jit_{module}",
        call=call,
        reads=tuple(slots[d, name] for d, each in ends for name in each.reads),
        writes=tuple(slots[buffer] for buffer in written),
        frees=tuple(slots[d, name] for d, each in ends for name in each.frees),
    )
