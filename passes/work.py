"""The work of each layer, as XLA counts it in the compiled programs of that layer."""

import dataclasses

import jax

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
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


def count_work(graph: LayerGraph) -> tuple[LayerWork, ...]:
    """Compile each layer's programs, equal ones once, and read XLA's counts."""
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    counted: dict[str, Work] = {}
    return tuple(
        _count_layer(layer.name, gradient, counted)
        for layer, gradient in zip(graph.layers, differentiate(stages), strict=True)
    )


def _count_layer(name: str, gradient: StageGradient, counted: dict[str, Work]) -> LayerWork:
    split = split_backward(gradient.backward)
    return LayerWork(
        name=name,
        forward=_count(gradient.forward, counted),
        backward=_count(gradient.backward, counted),
        input_grad=_count(split.input_grad, counted),
        weight_grad=_count(split.weight_grad, counted),
    )


def _count(program: StageProgram | None, counted: dict[str, Work]) -> Work:
    if program is None:
        return Work(flops=0.0, bytes_accessed=0.0)
    jaxpr = program.jaxpr

    def layer(*args: jax.Array) -> list[jax.Array]:
        return jaxprs.evaluate(jaxpr, args)

    lowered = jax.jit(layer).lower(*jaxprs.avals(jaxpr.invars))
    key = lowered.as_text()
    if key not in counted:
        analysis = lowered.compile().cost_analysis() or {}
        counted[key] = Work(
            flops=analysis.get("flops", 0.0), bytes_accessed=analysis.get("bytes accessed", 0.0)
        )
    return counted[key]
