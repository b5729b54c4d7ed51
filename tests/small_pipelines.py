"""Pipelines of small models, and a comparison with the plain function."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxptis
from jaxptis.cluster import Cluster
from jaxptis.compile import analyse
from jaxptis.options import Options
from jaxptis.placement import aval_of
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import schedule
from tests.small_models import IN, OUT, assert_close, loss_fn, make_batch, make_params

# The microbatches' sums are added in another order than the batch's.
RTOL = 1e-6


def make_pipelined(loss=loss_fn, *, num_devices=2, num_microbatches=2, **options):
    return jaxptis.pipeline(
        loss,
        num_microbatches=num_microbatches,
        devices=jax.devices()[:num_devices],
        **{"strategy": "1f1b", **options},
    )


def check(pipelined, loss, params, batch):
    """Compare loss and gradients with the plain ones; returns the gradients."""
    value, grads = pipelined.value_and_grad(params, batch)
    wanted_value, wanted_grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert_close(value, wanted_value, rtol=RTOL)
    assert_close(grads, wanted_grads, rtol=RTOL)
    return grads


class Nnx(nnx.Module):
    """A small model."""

    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(IN, width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, OUT, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(self.first(x))))


def model_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def plan_of(layers, devices, num_microbatches, num_devices=None):
    """Return a plan in which every device runs its forwards, then its backwards, stage by stage."""
    rows = [[] for _ in range(num_devices or max(devices) + 1)]
    tasks = schedule("gpipe", num_devices=len(layers), num_microbatches=num_microbatches)
    for s, device in enumerate(devices):
        rows[device] += [task for task in tasks[s] if task.kind == "F"]
    for s in reversed(range(len(layers))):
        rows[devices[s]] += [task for task in tasks[s] if task.kind == "B"]
    stages = (StagePlan(layers=tuple(n), device=d) for n, d in zip(layers, devices, strict=True))
    return Plan(stages=tuple(stages), schedule=tuple(map(tuple, rows)))


def refuse(message, pipelined, params=None, batch=None):
    """Check that gradients and evaluation are refused with `message`, an expression."""
    params = make_params(1) if params is None else params
    batch = make_batch() if batch is None else batch
    for call in pipelined.value_and_grad, pipelined.evaluate:
        with pytest.raises(ValueError, match=message):
            call(params, batch)


def analysis_of(loss, params, batch, num_devices, num_microbatches):
    """Return what all plans for a loss, arrays and devices have in common."""
    devices = tuple(jax.devices()[:num_devices])
    options = Options(
        num_microbatches=num_microbatches,
        devices=devices,
        strategy="1f1b",
        batch_axes=0,
        has_aux=False,
        cluster=Cluster.of(devices),
        dump_to=None,
    )
    return analyse(loss, *jax.tree.map(aval_of, (params, batch)), options)
