"""Random costs and devices that are small enough for every schedule to be looked at."""

from random import Random

from jaxptis.cluster import Cluster
from jaxptis.performance import Costs, LayerCost
from tests.clusters import device


def tiny_case(seed: int) -> tuple[Costs, Cluster, int]:
    """Return costs, up to 3 devices and up to 4 microbatches. All seconds are whole numbers.

    Some last layers take far longer than others; some models have no first input gradient, and
    some whole backwards take less than split ones.
    """
    rng = Random(seed)
    num_devices = rng.randint(1, 3)
    num_layers = rng.randint(num_devices, 8)
    trains_first, has_head = rng.random() < 0.5, rng.random() < 0.4
    layers = []
    for index in range(num_layers):
        forward_s, input_grad_s, weight_grad_s = (float(rng.randint(1, 6)) for _ in range(3))
        if has_head and index == num_layers - 1:
            forward_s, input_grad_s, weight_grad_s = 12.0, 15.0, 2.0
        layers.append(
            LayerCost(
                name=str(index),
                forward_s=forward_s,
                backward_s=input_grad_s + weight_grad_s - rng.choice((0, 0, 0, 1)),
                input_grad_s=input_grad_s if index or trains_first else 0.0,
                weight_grad_s=weight_grad_s,
            )
        )
    speeds = [rng.choice((1.0, 1.0, 1.0, 0.5)) for _ in range(num_devices)]
    cluster = Cluster(tuple(device(speed=speed) for speed in sorted(speeds)))
    return Costs(tuple(layers)), cluster, rng.randint(1, 4)
