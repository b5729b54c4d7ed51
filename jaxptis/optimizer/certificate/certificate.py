"""How short a step can be at all: bounds that hold for every plan, and what binds.

>>> from jaxptis.cluster import Cluster, DeviceSpec
>>> from jaxptis.performance import LayerCost
>>> seconds = dict(forward_s=1.0, backward_s=2.0, input_grad_s=1.0, weight_grad_s=1.0)
>>> costs = Costs(tuple(LayerCost(name=name, **seconds) for name in "abcd"))
>>> cluster = Cluster((DeviceSpec(kind="cpu", flops_per_s=1.0, bytes_per_s=1.0),) * 2)
>>> certificate = certify(costs, cluster, num_microbatches=8)
>>> round(certificate.bound_s, 1), round(certificate.gap(52.5), 3)
(49.0, 0.071)
"""

from dataclasses import dataclass

import numpy as np

from jaxptis.cluster import Cluster
from jaxptis.optimizer.certificate.bounds import chain_s, memory_s, work_s
from jaxptis.optimizer.certificate.least import Least
from jaxptis.optimizer.certificate.least_memory import check_possible
from jaxptis.optimizer.certificate.packing import Packing
from jaxptis.performance.costs import Costs


@dataclass(frozen=True)
class Bound:
    """Seconds that no step falls below, and what binds there, in words."""

    seconds: float
    binds: str


@dataclass(frozen=True)
class Certificate:
    """What is proven of every plan for given costs, devices and number of microbatches.

    Attributes:
        bounds: the largest first.
    """

    bounds: tuple[Bound, ...]

    @property
    def bound_s(self) -> float:
        """The seconds that no step falls below."""
        return self.bounds[0].seconds

    def gap(self, step_s: float) -> float:
        """Return by what fraction of the bound a step is longer than the bound."""
        return max(0.0, step_s / self.bound_s - 1) if self.bound_s else 0.0

    def text(self, step_s: float) -> str:
        """Return the gap of a step, what binds, and all bounds, times in milliseconds."""
        return "\n".join(
            [
                f"step {step_s * 1e3:.3f} ms, at most {self.gap(step_s):.2%} longer than that of "
                "any plan; no step is shorter than",
                *(f"{bound.seconds * 1e3:12.3f} ms: {bound.binds}" for bound in self.bounds),
            ]
        )


def certify(costs: Costs, cluster: Cluster, num_microbatches: int) -> Certificate:
    """Prove how short a step can be, over all plans.

    Args:
        costs: of the layers.
        cluster: the devices, with their memory and speed. Transfers only add time, and count
            nothing.
        num_microbatches: of a step.

    Raises:
        ValueError: no plan fits the memory; says what lacks how much, and what would do.
    """
    check_possible(costs, cluster)
    least, devices, M = Least.of(costs), cluster.devices, num_microbatches
    num_devices = f"{len(devices)} devices"
    shared_s = work_s(least, devices, M)
    chains_s = chain_s(least, devices, M)
    longest = int(np.argmax(chains_s))
    bounds = [
        Bound(
            shared_s,
            f"the work of all layers, shared evenly by {num_devices} from when each can begin",
        ),
        Bound(
            float(chains_s[longest]),
            f"layer {costs.layers[longest].name!r} cannot be cut: its device runs {M} microbatches "
            "of it, between the forwards and the input gradients of the layers before it",
        ),
    ]
    packing = Packing.of(least, devices, M)
    if packing is not None:
        packed_s = packing.least_step_s(max(bound.seconds for bound in bounds))
        bounds.append(Bound(packed_s, f"the work of whole layers, which {num_devices} share"))
    held_s = memory_s(costs, least, devices, M)
    if held_s:
        bounds.append(Bound(held_s, f"the memory of {num_devices} for what microbatches save"))
    return Certificate(tuple(sorted(bounds, key=lambda bound: -bound.seconds)))
