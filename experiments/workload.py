"""A model to plan and to run: its loss, parameters and tokens, what its layers cost, and links."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import jaxptis
from experiments.sleeping import slower
from jaxptis.cluster import Cluster
from jaxptis.make_plan import make_plan
from jaxptis.options import Strategy
from jaxptis.performance import Costs
from jaxptis.pipelined import Pipelined
from jaxptis.plan import Plan
from models import Model

MAX_TOKEN = 256  # tokens are bytes, whatever the vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A step of a model on some devices.

    Attributes:
        loss_fn: returns the loss and what is logged beside it.
        params: of the model.
        batch: of which each of num_microbatches is an equal part.
        num_microbatches: of the step.
        devices: of the pipeline.
        costs: measured, of a microbatch.
        cluster: the devices, with their links measured.
    """

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    num_microbatches: int
    devices: Sequence[jax.Device]
    costs: Costs
    cluster: Cluster

    def pipelined(self, strategy: Strategy) -> Pipelined:
        """Returns the loss as a pipeline."""
        return jaxptis.pipeline(
            self.loss_fn,
            num_microbatches=self.num_microbatches,
            devices=self.devices,
            has_aux=True,
            costs=self.costs,
            cluster=self.cluster,
            strategy=strategy,
        )

    def plan(self, strategy: Strategy) -> Plan:
        """Returns the plan of a strategy."""
        return make_plan(
            self.costs, strategy, cluster=self.cluster, num_microbatches=self.num_microbatches
        )

    def first(self, num_devices: int, num_microbatches: int) -> "Workload":
        """Returns the step of as many microbatches on the first devices."""
        size = len(self.batch["tokens"]) // self.num_microbatches
        links = {ends: x for ends, x in self.cluster.links.items() if max(ends) < num_devices}
        return dataclasses.replace(
            self,
            batch={"tokens": self.batch["tokens"][: size * num_microbatches]},
            num_microbatches=num_microbatches,
            devices=self.devices[:num_devices],
            cluster=Cluster(self.cluster.devices[:num_devices], self.cluster.link, links),
        )


def measured_workload(
    model: Model,
    config: Any,
    devices: Sequence[jax.Device],
    *,
    num_microbatches: int,
    microbatch_size: int,
    sequence_length: int,
    seed: int,
    times_slower: float,
) -> Workload:
    """Draws parameters and tokens, and measures the layers and the links.

    Args:
        model: the family.
        config: which of the family.
        devices: of the pipeline.
        num_microbatches: of a step.
        microbatch_size: sequences in each.
        sequence_length: tokens predicted in each.
        seed: of the parameters and the tokens.
        times_slower: by which costs are multiplied.
    """
    shape = num_microbatches * microbatch_size, sequence_length + 1
    tokens = np.random.default_rng(seed).integers(0, MAX_TOKEN, shape, np.int32)
    module, loss = model.module(config), model.loss(config)

    def loss_fn(params: Any, batch: Any) -> Any:
        return loss(functools.partial(module.apply, {"params": params}), batch)

    params = jax.jit(module.init)(jax.random.key(seed), tokens[:1])["params"]
    batch = {"tokens": tokens}
    pipelined = jaxptis.pipeline(
        loss_fn,
        strategy="1f1b",
        num_microbatches=num_microbatches,
        devices=devices,
        has_aux=True,
        costs="measured",
    )
    costs = pipelined.bind(None, params, batch).compiled.pipeline.analysis.costs
    return Workload(
        loss_fn=loss_fn,
        params=params,
        batch=batch,
        num_microbatches=num_microbatches,
        devices=devices,
        costs=slower(costs, times_slower),
        cluster=pipelined.options.cluster,
    )
