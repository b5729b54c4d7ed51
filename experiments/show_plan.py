"""Shows the layers that are found in a model, of any size: nothing of it is allocated.

python -m experiments.show_plan --model=deepseek --size=V3
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments.chosen_model import MODEL, SIZE
from models import MODELS
from passes import PROGRAM_PASSES, jaxprs
from passes.layers import LayerGraph, find_layers
from passes.runner import Dump, run
from passes.trace import trace

MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 1, "Sequences in a microbatch.", lower_bound=1
)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 4096, "Tokens predicted in each sequence.", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Prints a line a layer."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    report(find(MODEL.value, SIZE.value), Console())


def find(model: str, size: str) -> LayerGraph:
    """Returns the layers of a microbatch's loss."""
    config = MODELS[model].sizes[size]
    module, loss = MODELS[model].module(config), MODELS[model].loss(config)
    apply: Callable[..., Any] = module.apply

    def loss_fn(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return loss(functools.partial(apply, {"params": params}), batch)

    shape = (MICROBATCH_SIZE.value, SEQUENCE_LENGTH.value + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    program, _ = trace(loss_fn, params, {"tokens": tokens}, has_aux=True)
    return find_layers(run(program, PROGRAM_PASSES, Dump(None)))


def report(graph: LayerGraph, console: Console) -> None:
    """Prints the number of layers and of parameters, and both of each layer."""
    sizes = [math.prod(jaxprs.shape_of(v)) for v in graph.program.param_vars]
    table = Table("layer", "name", "parameters", box=None)
    for index, layer in enumerate(graph.layers):
        table.add_row(str(index), layer.name, f"{sum(sizes[p] for p in layer.params):,}")
    console.print(f"{len(graph.layers)} layers, {sum(sizes):,} parameters")
    console.print(table)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)
