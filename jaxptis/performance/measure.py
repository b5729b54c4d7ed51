"""Costs of layers from running their programs on a device.

Each program is compiled as the executor compiles that of a stage, and consumes the sums of
gradients as it does there; what else the executor lets a program overwrite, it does not. They are
run in turn, as in a step, and go through as many layers of each kind as the model has: run again
and again on the same arrays, a program finds what it reads in caches. Of large layers, which no
cache holds, there is one of each kind at a time.

What a layer takes may depend on what it reads, as that of experts does on how tokens choose them.
So where the parameters and a batch are at hand, each layer reads what it does in a step.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxptis.cluster import kind_of
from jaxptis.performance.calibrate import empty_program
from jaxptis.performance.costs import Costs
from jaxptis.performance.layer_costs import KindCost, Track, kinds_of, layer_costs, tied_params
from passes import jaxprs
from passes.layer_programs import LayerKind, LayerPrograms
from passes.stages import Operand, Role, StageProgram

LEAST_RUNS, MOST_RUNS = 9, 99
ENOUGH_S = 0.3
"""Seconds for each program, on average, after which none is run more than `LEAST_RUNS` times."""

CACHES_BYTES = 2**28
"""More than caches hold: arrays of further layers of a kind are not needed beyond it."""

_SCALE = 0.02  # of random floats: what models begin with
_NUM_NORMALS = 65_537  # drawn for an array, and repeated; a prime, so that rows differ


def measure(
    layers: Sequence[LayerPrograms],
    device: Any,
    *,
    state_bytes: Mapping[int, int] = MappingProxyType({}),
    values: Mapping[Operand, Any] = MappingProxyType({}),
    track: Track = iter,
    ready: Callable[[], None] = lambda: None,
) -> Costs:
    """Return the median seconds of the programs of each kind of layer; see `measure_kinds`."""
    costs, start_s = measure_kinds(layers, device, values=values, track=track, ready=ready)
    return measured_costs(layers, costs, start_s, device, state_bytes)


def measured_costs(
    layers: Sequence[LayerPrograms],
    costs: Mapping[int, KindCost],
    start_s: float,
    device: Any,
    state_bytes: Mapping[int, int],
) -> Costs:
    """Return the costs of layers whose kinds were measured.

    Args:
        layers: what they run.
        costs: of each kind, by its index.
        start_s: of every task.
        device: on which they were measured.
        state_bytes: the optimizer's state of each parameter.
    """
    return Costs(
        layer_costs(layers, costs, state_bytes),
        tied=tied_params(layers, state_bytes),
        start_s=start_s,
        source="measured",
        device=kind_of(device),
        settings={"jax": jax.__version__},
    )


def measure_kinds(
    layers: Sequence[LayerPrograms],
    device: Any,
    *,
    values: Mapping[Operand, Any] = MappingProxyType({}),
    track: Track = iter,
    ready: Callable[[], None] = lambda: None,
) -> tuple[dict[int, KindCost], float]:
    """Return what the programs of each kind take, and the seconds to start one.

    These are the median of a program that does nothing with as many arrays; they are taken off
    all others.

    Args:
        layers: what they run.
        device: one of `jax.local_devices()`.
        values: of all parameters and of a microbatch, by their operands; random arrays if empty.
        track: goes through the programs, as they are compiled, then through the layers; those of
            known kinds are quickly done.
        ready: called when all is compiled, before anything is timed; waits for other processes that
            measure at the same time.

    Raises:
        ValueError: the device belongs to another process.
    """
    if device not in jax.local_devices(backend=device.platform):
        raise ValueError(f"{device} belongs to another process; measure on a device of this one")
    kinds = kinds_of(layers)
    programs = _prepare(layers, values, device, track)
    in_turn = sorted(programs, key=_place)
    ready()
    start_runs_s, *runs_s = _seconds([_empty(kinds, device), *in_turn])
    start_s = statistics.median(start_runs_s)
    seconds = dict(zip(in_turn, runs_s, strict=True))
    costs = {
        kind.index: _kind_cost({p: seconds[p] for p in programs if p.kind == kind.index}, start_s)
        for kind in kinds
    }
    return costs, start_s


def _empty(kinds: Sequence[LayerKind], device: Any) -> Callable[[], Any]:
    """Return an empty program of typical arity, and its arguments."""
    programs = [program for kind in kinds for program in kind.programs.values()]
    num_inputs = statistics.median_high(len(program.reads) for program in programs)
    num_outputs = statistics.median_high(len(program.writes) for program in programs)
    return empty_program(num_inputs, num_outputs, device)


def _compile(program: StageProgram, device: Any) -> Any:
    def layer(*args: Any) -> list[Any]:
        return jaxprs.evaluate(program.jaxpr, args)

    sharding = jax.sharding.SingleDeviceSharding(device)
    avals = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for a in jaxprs.avals(program.jaxpr.invars)
    ]
    sums = [k for k, x in enumerate(program.reads) if x.role == Role.SUM]
    lowered = jax.jit(layer, donate_argnums=sums).lower(*avals)
    return lowered.compile(compiler_options=jaxprs.least_memory(device.platform))


def _prepare(
    layers: Sequence[LayerPrograms], values: Mapping[Operand, Any], device: Any, track: Track
) -> list["_Running"]:
    """Compile the programs of each kind, make their arguments, and run each once on all of them."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiling = {
            kind.index: {
                name: pool.submit(_compile, program, device)
                for name, program in kind.programs.items()
            }
            for kind in kinds_of(layers)
        }
        # What is compiled for a GPU is tried on it, and cuDNN's attention cannot be run meanwhile.
        for each in track([x for programs in compiling.values() for x in programs.values()]):
            each.result()
        return _run_once(layers, compiling, values, device, track)


def _run_once(
    layers: Sequence[LayerPrograms],
    compiling: Mapping[int, Mapping[str, Future[Any]]],
    values: Mapping[Operand, Any],
    device: Any,
    track: Track,
) -> list["_Running"]:
    """Make the arguments of the programs of each kind, and run each once on all of them."""
    most = math.ceil(CACHES_BYTES / sum(map(_num_bytes, kinds_of(layers))))
    programs: dict[int, list[_Running]] = {}
    known = dict(values)  # and what layers make for others
    for layer in track(layers):
        kind = layer.kind
        count = len(programs[kind.index][0].arguments) if kind.index in programs else 0
        if count == most and not values:
            continue
        arguments = _arguments(layer, known, device)
        if not count:
            programs[kind.index] = [
                _Running(kind.index, name, program, compiling[kind.index][name].result())
                for name, program in kind.programs.items()
            ]
        running = programs[kind.index] if count < most else programs[kind.index][:1]
        for each in running:
            jax.block_until_ready(each.run_on(arguments))  # what it makes, those after it read
        if count < most:
            for each in running:
                each.arguments.append(arguments)
        if values:
            crossings = {x: own for x, own in layer.operands.items() if own.role == Role.CROSSING}
            known |= {own: arguments[x] for x, own in crossings.items()}
    return [each for running in programs.values() for each in running]


def _arguments(
    layer: LayerPrograms, known: Mapping[Operand, Any], device: Any
) -> dict[Operand, Any]:
    """Return what the programs of a layer read and do not make; what is not known is drawn."""
    arguments: dict[Operand, Any] = {}
    made: set[Operand] = set()
    for program in layer.kind.programs.values():
        for operand, v in zip(program.reads, program.jaxpr.invars, strict=True):
            if operand not in arguments and operand not in made:
                own = layer.operands.get(operand)
                value = None if own is None else known.get(own)
                if value is None:
                    value = _value(operand, v.aval, layer.kind)
                array = value if isinstance(value, jax.Array) else np.asarray(value)
                arguments[operand] = jax.device_put(array, device)
        made.update(program.writes)
    return arguments


def _num_bytes(kind: LayerKind) -> int:
    """Return the bytes of the arguments and the results of all programs of a layer."""
    avals: dict[Operand, Any] = {}
    for program in kind.programs.values():
        avals.update(zip(program.reads, jaxprs.avals(program.jaxpr.invars), strict=True))
        avals.update(zip(program.writes, jaxprs.avals(program.jaxpr.outvars), strict=True))
    return jaxprs.nbytes(avals.values())


def _place(program: "_Running") -> tuple[int, int]:
    """Return the place of a program in a step: the last layer's backward is the first."""
    kind = program.kind if program.name == "F" else -program.kind
    return ("F", "again", "B", "I", "W").index(program.name), kind


def _kind_cost(runs_s: Mapping["_Running", Sequence[float]], start_s: float) -> KindCost:
    seconds, spreads = {}, []
    for program, each_s in runs_s.items():
        median_s = statistics.median(each_s)
        first_s, _, third_s = statistics.quantiles(each_s, n=4, method="inclusive")
        seconds[program.name] = max(0.0, median_s - start_s)
        spreads.append((third_s - first_s) / median_s)
    return KindCost(
        seconds=seconds,
        temporary_bytes={program.name: program.temporary_bytes for program in runs_s},
        spread=max(spreads),
    )


class _Running:
    """A compiled program, and the arguments of each layer that it is run for, in turn."""

    def __init__(self, kind: int, name: str, program: StageProgram, compiled: Any) -> None:
        """Take what was compiled; arguments must follow."""
        self.kind, self.name = kind, name
        self.arguments: list[dict[Operand, Any]] = []
        self._program, self._compiled, self._num_runs = program, compiled, 0

    def __call__(self) -> list[Any]:
        # A backward reads what a forward has made long ago.
        turn = self._num_runs + (self.name != "F")
        self._num_runs += 1
        return self.run_on(self.arguments[turn % len(self.arguments)])

    def run_on(self, arguments: dict[Operand, Any]) -> list[Any]:
        """Run for a layer; results take the places of arguments that are consumed."""
        results = self._compiled(*[arguments[x] for x in self._program.reads])
        arguments.update(zip(self._program.writes, results, strict=True))
        return results

    @property
    def temporary_bytes(self) -> int:
        """What the program needs beside its inputs and results."""
        memory = self._compiled.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0


def _seconds(programs: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Run all in turn until it is enough; return the seconds of every run of each."""
    runs_s: list[list[float]] = [[] for _ in programs]
    enough_s = ENOUGH_S * len(programs)
    for count in range(MOST_RUNS):
        if count >= LEAST_RUNS and sum(map(sum, runs_s)) >= enough_s:
            break
        for run, seconds in zip(programs, runs_s, strict=True):
            start_s = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start_s)
    return runs_s


def _value(operand: Operand, aval: Any, kind: LayerKind) -> Any:
    """Return an array that a program may be given."""
    if operand.role == Role.CONSTANT:
        return kind.gradient.constants[operand.index]
    if operand.role == Role.SUM:
        return np.zeros(aval.shape, aval.dtype)
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):  # keys of random numbers
        return jax.numpy.zeros(aval.shape, aval.dtype)
    rng = np.random.default_rng(operand.index)
    if jaxprs.is_float(aval):
        normals = _SCALE * rng.normal(size=_NUM_NORMALS)
        return np.resize(normals.astype(aval.dtype), aval.shape)
    return rng.integers(0, _num_indices(kind), aval.shape).astype(aval.dtype)


def _num_indices(kind: LayerKind) -> int:
    """Return how many integers, from 0 on, index every array that the layer takes parts of."""
    equations = jaxprs.equations(kind.gradient.forward.jaxpr)
    sizes = [size for eqn in equations for size in jaxprs.indexed_sizes(eqn)]
    return min(sizes, default=2)
