"""The work of each layer, as XLA counts it in the compiled forward and backward of that layer."""

import dataclasses

import jax

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.jaxprs import Jaxpr
from passes.layers import LayerGraph


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


def count_work(graph: LayerGraph) -> tuple[LayerWork, ...]:
    """Compile each layer's forward and backward, equal ones once, and read XLA's counts."""
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    counted: dict[str, Work] = {}
    return tuple(
        LayerWork(
            name=layer.name,
            forward=_count(gradient.forward, counted),
            backward=_count(gradient.backward, counted),
        )
        for layer, gradient in zip(graph.layers, differentiate(stages), strict=True)
    )


def _count(jaxpr: Jaxpr, counted: dict[str, Work]) -> Work:
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
