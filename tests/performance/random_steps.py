"""Random plans, costs and clusters, in which all seconds and bytes are small whole numbers."""

from dataclasses import dataclass
from math import inf
from random import Random

from experiments.random_plan import random_plan
from jaxptis.cluster import Cluster, DeviceSpec, Link
from jaxptis.performance import Costs, LayerCost, TiedParams
from jaxptis.plan import Plan
from tests.clusters import device

_SECONDS = [0, 1, 1, 2, 3, 5]
_BYTES = [0, 2, 4, 6, 12]


@dataclass(frozen=True)
class Step:
    plan: Plan
    costs: Costs
    cluster: Cluster


def random_step(rng: Random) -> Step:
    plan = random_plan(rng)
    plan = plan if rng.random() < 0.9 else plan.forward_only()
    return Step(plan, _costs(rng, plan), _cluster(rng, plan.num_devices))


def _costs(rng: Random, plan: Plan) -> Costs:
    names = plan.layers
    seconds = {
        what: [rng.choice(_SECONDS) for _ in names]
        for what in ("forward_s", "backward_s", "input_grad_s", "weight_grad_s", "recompute_s")
    }
    sizes = {
        f"{what}_bytes": [rng.choice(_BYTES) for _ in names]
        for what in (
            *("input", "skipping", "saved", "saved_all", "kept", "made"),
            *("param", "grad", "state"),
            *(f"{kind}_temporary" for kind in ("forward", "backward", "input_grad", "weight_grad")),
            *("backward_held", "input_grad_held"),
        )
    }
    layers = (
        LayerCost(name=name, **{what: column[i] for what, column in (seconds | sizes).items()})
        for i, name in enumerate(names)
    )
    shared = rng.sample(names, min(len(names), 3))
    tied = TiedParams(layers=tuple(shared), param_bytes=1, grad_bytes=10, state_bytes=100)
    return Costs(tuple(layers), tied=(tied,) * rng.randint(0, 1), start_s=rng.randint(0, 1))


def _cluster(rng: Random, num_devices: int) -> Cluster:
    """Return devices that are equal, or half or a fourth as fast; each link may be another."""

    def spec() -> DeviceSpec:
        return device(speed=rng.choice((1.0, 1.0, 0.5, 0.25)))

    def link() -> Link:
        return Link(latency_s=rng.choice((0, 0, 1, 4)), bytes_per_s=rng.choice((inf, 2, 1)))

    pairs = [(a, b) for a in range(num_devices) for b in range(num_devices) if a != b]
    others = {pair: link() for pair in pairs if rng.random() < 0.3}
    return Cluster(tuple(spec() for _ in range(num_devices)), link(), others)
