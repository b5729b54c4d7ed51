"""The work of each layer, as XLA counts it in the compiled programs of that layer.

They are compiled as the executor compiles those of a stage: for least memory, and gradients are
added to sums in the memory of these.

XLA counts what is inside of a loop once, whatever the loop's length. So the body of a scan is also
counted by itself, and added for each further iteration: on a window of each array that it goes
through (see windows.py). A while loop, of which nobody knows the number of iterations, is counted
as a single one.

On a GPU XLA calls libraries for matmuls and attention, and counts nothing of them: they are counted
in the jaxpr, and added.
"""

import dataclasses
import hashlib
from typing import Any

import jax

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Scan
from passes.layer_programs import LayerKind
from passes.origins import called_body
from passes.stages import Role, StageProgram
from passes.windows import body_on_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a program does.

    Attributes:
      flops: floating-point operations.
      bytes_accessed: read and written.
      temporary_bytes: of memory that it needs beside its inputs and results.
    """

    flops: float
    bytes_accessed: float
    temporary_bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(
            flops=self.flops + other.flops,
            bytes_accessed=self.bytes_accessed + other.bytes_accessed,
            temporary_bytes=max(self.temporary_bytes, other.temporary_bytes),
        )

    def __mul__(self, times: int) -> "Work":
        return Work(
            flops=self.flops * times,
            bytes_accessed=self.bytes_accessed * times,
            temporary_bytes=self.temporary_bytes,
        )


_NO_WORK = Work(flops=0.0, bytes_accessed=0.0, temporary_bytes=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWork:
    """The work of a layer for one microbatch; see `LayerKind`."""

    forward: Work
    backward: Work
    input_grad: Work
    weight_grad: Work
    again: Work


# By the text of a program: what was compiled once in this process is not compiled again.
_counted: dict[bytes, Work] = {}


def count_work(kind: LayerKind) -> LayerWork:
    """Compile a layer's programs and the bodies of their scans, equal ones once, and count."""
    return LayerWork(
        forward=_count(kind.gradient.forward),
        backward=_count(kind.gradient.backward),
        input_grad=_count(kind.split.input_grad),
        weight_grad=_count(kind.split.weight_grad),
        again=_count(kind.again),
    )


def _count(program: StageProgram | None) -> Work:
    if program is None:
        return _NO_WORK
    sums = tuple(k for k, operand in enumerate(program.reads) if operand.role == Role.SUM)
    return _count_once(program.jaxpr, sums) + _further_iterations(program.jaxpr)


def _further_iterations(jaxpr: Jaxpr) -> Work:
    """Return the work of the scans in `jaxpr`, but for what XLA counts of them."""
    return sum(map(_further_iterations_of, jaxpr.eqns), _NO_WORK)


def _further_iterations_of(eqn: JaxprEqn) -> Work:
    scan, called = jaxprs.scan_of(eqn), called_body(eqn)
    if scan is not None:
        return _further_iterations_of_scan(scan)
    bodies = [called] if called is not None else []
    if eqn.primitive.name in ("cond", "while"):
        bodies += jaxprs.sub_jaxprs(eqn)
    # Of branches XLA counts the largest.
    return max(map(_further_iterations, bodies), key=lambda work: work.flops, default=_NO_WORK)


def _further_iterations_of_scan(scan: Scan) -> Work:
    further = max(scan.length // scan.unroll - 1, 0) * scan.unroll
    inside = _further_iterations(scan.jaxpr) * scan.length
    return inside + _count_once(body_on_windows(scan)) * further if further else inside


def _count_once(jaxpr: Jaxpr, donated: tuple[int, ...] = ()) -> Work:
    """Return XLA's count, which has one iteration of each loop."""
    key = hashlib.sha256(f"{donated} {jaxpr}".encode()).digest()
    if key not in _counted:
        _counted[key] = _compile_and_count(jaxpr, donated)
    return _counted[key]


# Of what comes after the passes that decide what is counted, as little as possible.
_COUNT_ONLY: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# Nothing is run, so nothing is tuned; every matmul is a library's, which is counted here.
_COUNT_ONLY_ON_GPU: dict[str, Any] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}


def _compile_and_count(jaxpr: Jaxpr, donated: tuple[int, ...]) -> Work:
    def layer(*args: jax.Array) -> list[jax.Array]:
        return jaxprs.evaluate(jaxpr, args)

    lowered = jax.jit(layer, donate_argnums=donated).lower(*jaxprs.avals(jaxpr.invars))
    on_gpu = jax.default_backend() == "gpu"
    options = _COUNT_ONLY | jaxprs.least_memory(jax.default_backend())
    compiled = lowered.compile(compiler_options=options | (_COUNT_ONLY_ON_GPU if on_gpu else {}))
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    counts = [jaxprs.library_work(eqn) for eqn in jaxprs.equations(jaxpr)] if on_gpu else []
    # Of a program that is nothing else XLA says -1.
    return Work(
        flops=max(0.0, analysis.get("flops", 0.0)) + sum(flops for flops, _ in counts),
        bytes_accessed=max(0.0, analysis.get("bytes accessed", 0.0))
        + sum(num_bytes for _, num_bytes in counts),
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
    )
