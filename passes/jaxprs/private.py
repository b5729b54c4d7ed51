"""The one file that imports JAX's private parts, or names options of XLA."""

from typing import Any

from jax._src import distributed, source_info_util
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax._src.interpreters import partial_eval
from jax._src.lax.lax import optimization_barrier_p
from jax.extend.core import Jaxpr, JaxprEqn

from passes.jaxprs.build import rebuild

__all__ = [
    "MaskType",
    "drop_dead_equations",
    "least_memory",
    "located",
    "optimization_barrier_p",
    "process_service",
]


def drop_dead_equations(jaxpr: Jaxpr) -> Jaxpr:
    """Remove, also inside loops and branches, what no output reads; inputs all stay."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return rebuild(live)


def located(eqn: JaxprEqn) -> str:
    """Return `primitive at file:line (function)`, the user's; `primitive` if no line is known."""
    line = source_info_util.summarize(eqn.source_info)
    return f"{eqn.primitive.name} at {line}" if line else eqn.primitive.name


def least_memory(platform: str) -> dict[str, Any]:
    """Return the compiler options with which a program has as few temporaries as XLA can do.

    For a CPU it orders operations for most of them to run at once, unless told otherwise: a stage
    then holds the gradients of all its parameters beside their sums.
    """
    if platform != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def process_service() -> Any:
    """Return the client of the key-value service that `jax.distributed` runs, or None.

    It is here for being private: JAX has no public way to the service.
    """
    return distributed.global_state.client
