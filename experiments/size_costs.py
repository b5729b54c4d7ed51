"""What layers of the published sizes cost an H200: measured, or estimated like one measured.

What XLA counts on a CPU is not what a GPU does: it has attention in full, for one. So each number
that is estimated of a layer is multiplied by measured over estimated of the same layer in the size
of its family that was measured.
"""

import dataclasses
import re
from pathlib import Path

import optax

from experiments.model_layers import layers_of
from jaxptis.cluster import DEVICE_SPECS
from jaxptis.performance import Costs, LayerCost
from jaxptis.performance.estimate import estimate
from jaxptis.performance.optimizer_state import optimizer_state_bytes
from models import MODELS
from passes.layer_programs import layer_programs

FOLDER = Path(__file__).parent / "results" / "costs"
DEVICE = DEVICE_SPECS["NVIDIA H200"]
MEASURED = {"llama2": "7B", "gemma": "7B", "deepseek": "V2-Lite", "nemotron_h": "8B"}
SEQUENCE_LENGTH = 4096

_SECONDS_AND_BYTES = [
    each.name for each in dataclasses.fields(LayerCost) if each.name.endswith(("_s", "_bytes"))
]


def size_costs(family: str, size: str) -> Costs:
    """Returns the costs of a size, and keeps in FOLDER what was estimated."""
    measured_size = MEASURED[family]
    if size == measured_size:
        return Costs.load(FOLDER / f"{family}-{size}-H200.json")
    path = FOLDER / f"{family}-{size}-estimated.json"
    if not path.exists():
        measured = size_costs(family, measured_size)
        corrected(estimated(family, size), estimated(family, measured_size), measured).save(path)
    return Costs.load(path)


def estimated(family: str, size: str) -> Costs:
    """Returns what XLA counts, with the state of AdamW; nothing of the model is allocated."""
    model = MODELS[family]
    config = model.sizes[size]
    graph, params = layers_of(model, config, microbatch_size=1, sequence_length=SEQUENCE_LENGTH)
    optimizer = model.steer(optax.adamw(1e-3))
    state_bytes = optimizer_state_bytes(graph.program, params, optimizer)
    costs = estimate(layer_programs(graph), DEVICE, state_bytes=state_bytes)
    settings = {
        "model": family,
        "size": size,
        "seq_len": SEQUENCE_LENGTH,
        "microbatch_size": 1,
        "optimizer": "adamw",
        "dtype": config.dtype.__name__,
    }
    return dataclasses.replace(costs, settings=settings)


def corrected(costs: Costs, known: Costs, measured: Costs) -> Costs:
    """Returns estimated costs times measured over estimated of a model of like layers.

    Args:
        costs: to correct; a layer that the other model lacks stays as it is.
        known: of the other model, estimated likewise.
        measured: of the other model.
    """
    before, after = ({_role(x.name): x for x in each.layers} for each in (known, measured))

    def correct(layer: LayerCost) -> LayerCost:
        role = _role(layer.name)
        if role not in before:
            return layer
        numbers = {}
        for name in _SECONDS_AND_BYTES:
            number, was, now = (getattr(x, name) for x in (layer, before[role], after[role]))
            numbers[name] = type(number)(number * now / was) if was else number
        return dataclasses.replace(layer, **numbers)

    source = f"times measured over estimated of {measured.settings['size']}"
    return dataclasses.replace(
        costs,
        layers=tuple(correct(layer) for layer in costs.layers),
        start_s=measured.start_s,
        settings={**costs.settings, "corrected": source},
    )


def _role(name: str) -> str:
    """Returns what a layer is in any block: its name without the block's, and without a number."""
    return re.sub("^(layers_[0-9]+|after_next/block)/|#[0-9]+$", "", name)
