"""Shows the layers that are found in a model, of any size: nothing of it is allocated.

python -m experiments.show_plan --model=deepseek --size=V3
"""

import math

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments.chosen_model import MODEL, SIZE
from experiments.model_layers import layers_of
from models import MODELS
from passes import jaxprs
from passes.layers import LayerGraph

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
    model = MODELS[MODEL.value]
    graph, _ = layers_of(
        model,
        model.sizes[SIZE.value],
        microbatch_size=MICROBATCH_SIZE.value,
        sequence_length=SEQUENCE_LENGTH.value,
    )
    report(graph, Console())


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
