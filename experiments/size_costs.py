"""What layers of the published sizes cost an H200, in files of experiments.measure_layers.

All are measured but those of DeepSeek-V3, which are estimated: its layer of experts takes 181 GB
with gradients and moments, so that whether it fits a device does not depend on seconds.
"""

import dataclasses
from pathlib import Path

from experiments.sliced_costs import with_slices
from jaxptis.cluster import DEVICE_SPECS
from jaxptis.performance import Costs

FOLDER = Path(__file__).parent / "results" / "costs"
DEVICE = DEVICE_SPECS["NVIDIA H200"]
ESTIMATED = {("deepseek", "V3")}


def size_costs(family: str, size: str, head_slices: int = 1) -> Costs:
    """Returns the costs of a size, with its head in so many slices.

    The layers before the head cost what they do beside a whole one, even if they were measured
    again: only what is gained by slices is to differ.
    """
    source = "estimated" if (family, size) in ESTIMATED else "H200"
    path = FOLDER / f"{family}-{size}-{source}.json"
    *before, _ = Costs.load(path).layers
    same = {layer.name: layer for layer in before}
    costs = Costs.load(with_slices(path, head_slices))
    return dataclasses.replace(
        costs, layers=tuple(same.get(layer.name, layer) for layer in costs.layers)
    )
