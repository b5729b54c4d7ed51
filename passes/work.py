"""The work of each layer, as XLA counts it in the compiled programs of that layer."""

import dataclasses
import hashlib

import jax

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.jaxprs import Jaxpr
from passes.layers import LayerGraph
from passes.split_backward import split_backward
from passes.stages import StageGradient, StageProgram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a program does: floating-point operations, and bytes read and written."""

    flops: float
    bytes_accessed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWork:
    """The work of a layer for one microbatch."""

    name: str
    forward: Work
    backward: Work
    input_grad: Work
    weight_grad: Work


# By the text of a program: what was compiled once in this process is not compiled again.
_counted: dict[bytes, Work] = {}


def count_work(graph: LayerGraph) -> tuple[LayerWork, ...]:
    """Compile each layer's programs, equal ones once, and read XLA's counts."""
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    return tuple(
        _count_layer(layer.name, gradient)
        for layer, gradient in zip(graph.layers, differentiate(stages), strict=True)
    )


def _count_layer(name: str, gradient: StageGradient) -> LayerWork:
    split = split_backward(gradient.backward)
    return LayerWork(
        name=name,
        forward=_count(gradient.forward),
        backward=_count(gradient.backward),
        input_grad=_count(split.input_grad),
        weight_grad=_count(split.weight_grad),
    )


def _count(program: StageProgram | None) -> Work:
    if program is None:
        return Work(flops=0.0, bytes_accessed=0.0)
    jaxpr = program.jaxpr
    key = hashlib.sha256(str(jaxpr).encode()).digest()
    if key not in _counted:
        _counted[key] = _compile_and_count(jaxpr)
    return _counted[key]


def _compile_and_count(jaxpr: Jaxpr) -> Work:
    def layer(*args: jax.Array) -> list[jax.Array]:
        return jaxprs.evaluate(jaxpr, args)

    compiled = jax.jit(layer).lower(*jaxprs.avals(jaxpr.invars)).compile()
    analysis = compiled.cost_analysis() or {}
    return Work(
        flops=analysis.get("flops", 0.0), bytes_accessed=analysis.get("bytes accessed", 0.0)
    )
