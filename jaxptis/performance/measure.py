"""Costs of layers from running their programs on a device.

Each program is compiled as the executor compiles that of a stage, and consumes the sums of
gradients as it does there; what else the executor lets a program overwrite, it does not. The
arrays of one kind of layer are there at a time.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxptis.cluster import kind_of
from jaxptis.performance.costs import Costs
from jaxptis.performance.layer_costs import KindCost, Track, kinds_of, layer_costs, tied_params
from passes import jaxprs
from passes.layer_programs import LayerKind, LayerPrograms
from passes.stages import Operand, Role, StageProgram

LEAST_RUNS, MOST_RUNS = 9, 99
ENOUGH_S = 0.3
"""Seconds after which a program is run no more than `LEAST_RUNS` times."""

_SCALE = 0.02  # of random floats: what models begin with
_NUM_NORMALS = 65_537  # drawn for an array, and repeated; a prime, so that rows differ


def measure(
    layers: Sequence[LayerPrograms],
    device: Any,
    *,
    state_bytes: Mapping[int, int] = MappingProxyType({}),
    track: Track = iter,
) -> Costs:
    """Return the median seconds of the programs of each kind of layer, on random arrays.

    `start_s` is the median of a program that does nothing with as many arrays; it is taken off
    all others.

    Args:
        layers: what they run.
        device: one of `jax.local_devices()`.
        state_bytes: the optimizer's state of each parameter.
        track: goes through the kinds of layers.

    Raises:
        ValueError: the device belongs to another process.
    """
    if device not in jax.local_devices(backend=device.platform):
        raise ValueError(f"{device} belongs to another process; measure on a device of this one")
    kinds = kinds_of(layers)
    start_s = _measure_start(kinds, device)
    costs = {kind.index: _measure_kind(kind, device, start_s) for kind in track(kinds)}
    return Costs(
        layer_costs(layers, costs, state_bytes),
        tied=tied_params(layers, state_bytes),
        start_s=start_s,
        source="measured",
        device=kind_of(device),
        settings={"jax": jax.__version__},
    )


def _measure_start(kinds: Sequence[LayerKind], device: Any) -> float:
    """Return the median seconds of an empty program of typical arity."""
    programs = [program for kind in kinds for program in kind.programs.values()]
    num_inputs = statistics.median_high(len(program.reads) for program in programs)
    num_outputs = statistics.median_high(len(program.writes) for program in programs)
    zero = jax.device_put(np.float32(0), device)
    empty = jax.jit(lambda *args: [args[0] + k for k in range(num_outputs)])
    compiled = empty.lower(*[zero] * num_inputs).compile()
    return statistics.median(_seconds(lambda: compiled(*[zero] * num_inputs)))


def _measure_kind(kind: LayerKind, device: Any, start_s: float) -> KindCost:
    """Run the programs in turn, each on what those before it made."""
    values: dict[Operand, Any] = {}
    seconds, spreads, temporaries = {}, [], []
    for name, program in kind.programs.items():
        for operand, v in zip(program.reads, program.jaxpr.invars, strict=True):
            if operand not in values:
                values[operand] = jax.device_put(_value(operand, v.aval, kind), device)
        running = _Running(program, values, device.platform)
        runs_s = _seconds(running)
        median_s = statistics.median(runs_s)
        first_s, _, third_s = statistics.quantiles(runs_s, n=4, method="inclusive")
        seconds[name] = max(0.0, median_s - start_s)
        spreads.append((third_s - first_s) / median_s)
        temporaries.append(running.temporary_bytes)
    return KindCost(seconds=seconds, temporary_bytes=max(temporaries), spread=max(spreads))


class _Running:
    """A compiled program and its arguments; the sums of gradients are those of the run before."""

    def __init__(self, program: StageProgram, values: dict[Operand, Any], platform: str) -> None:
        """Take arguments from `values`, in which results replace what is consumed."""
        self._program, self._values = program, values
        sums = [k for k, x in enumerate(program.reads) if x.role == Role.SUM]

        def layer(*args: Any) -> list[Any]:
            return jaxprs.evaluate(program.jaxpr, args)

        jitted = jax.jit(layer, donate_argnums=sums)
        lowered = jitted.lower(*[values[x] for x in program.reads])
        options = jaxprs.least_memory(platform)
        self._compiled = lowered.compile(compiler_options=options)

    def __call__(self) -> list[Any]:
        results = self._compiled(*[self._values[x] for x in self._program.reads])
        self._values.update(zip(self._program.writes, results, strict=True))
        return results

    @property
    def temporary_bytes(self) -> int:
        """What the program needs beside its inputs and results."""
        memory = self._compiled.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0


def _seconds(run: Callable[[], Any]) -> list[float]:
    """Run to warm up, then until it is enough, and return the seconds of every run."""
    jax.block_until_ready(run())
    runs_s: list[float] = []
    while len(runs_s) < LEAST_RUNS or (len(runs_s) < MOST_RUNS and sum(runs_s) < ENOUGH_S):
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        runs_s.append(time.perf_counter() - start_s)
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
