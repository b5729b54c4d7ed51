"""Trainers of Flax classes, and ten of their steps beside plain ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxptis
from tests.plain_training import (
    OPTIMIZERS,
    RTOL,
    batches,
    check_steps,
    device_sets,
    find_adam,
    sharding_devices,
)
from tests.small_models import HIDDEN, IN, OUT, WIDTH, assert_close
from tests.small_pipelines import model_loss

pytestmark = pytest.mark.usefixtures("lenient")


class Linen(linen.Module):
    width: int = WIDTH

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.width)(x)
        for _ in range(2):
            x = x + linen.Dense(self.width)(jnp.tanh(linen.Dense(HIDDEN)(x)))
        return linen.Dense(OUT)(x)


class NnxBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Nnx(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(IN, width, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, OUT, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for each in self.blocks:
            x = each(x)
        return self.head(x)


def decorate(cls):
    return jaxptis.pipeline(cls, strategy="1f1b", num_microbatches=4, devices=jax.devices()[:4])


def check_trainer(trainer, key, loss, params, optimizer):
    """Train as `trainer` and plainly; `params` is what it must start from."""
    data = batches()
    state = trainer.init(key, data[0])
    # The same random bits, made into numbers by another fusion of the same arithmetic.
    assert_close(state.params, params, rtol=1e-6)
    adam = find_adam(state.opt_state)
    places = device_sets(state.params)
    found = list(map(sharding_devices, jax.tree.leaves(state.params)))
    assert all(len(devices) == 1 for devices in found) and len(set().union(*found)) == 4
    assert device_sets(adam.mu) == places and device_sets(adam.nu) == places
    before = trainer.evaluate(state, data[0])["loss"]
    assert float(before) == pytest.approx(float(loss(params, data[0])), rel=RTOL)
    check_steps(trainer.step, state, loss, optimizer, params, data)
    assert trainer.num_tasks == 2 * 4 * 4  # forward and backward, stages, microbatches
    assert trainer.host_s_per_task > 0
    assert trainer.plan.num_stages == len(trainer.stages) == 4
    assert trainer.timeline.text()


def test_linen_class():
    optimizer = OPTIMIZERS["clipped"]
    model = decorate(Linen)()
    key = jax.random.key(5)
    trainer = model.trainer(loss=model_loss, optimizer=optimizer)
    plain = Linen()
    params = plain.init(key, batches(1)[0]["x"])["params"]

    def loss(params, batch):
        return model_loss(functools.partial(plain.apply, {"params": params}), batch)

    check_trainer(trainer, key, loss, params, optimizer)


def nnx_parts(key):
    graphdef, params = nnx.split(Nnx(WIDTH, rngs=nnx.Rngs(key)), nnx.Param)

    def loss(params, batch):
        return model_loss(nnx.merge(graphdef, params), batch)

    return loss, params


def test_nnx_class():
    optimizer = OPTIMIZERS["adamw"]
    key = jax.random.key(5)
    trainer = decorate(Nnx).trainer(WIDTH, loss=model_loss, optimizer=optimizer)
    loss, params = nnx_parts(key)
    check_trainer(trainer, key, loss, params, optimizer)


def test_nnx_instance():
    key = jax.random.key(6)
    model = decorate(Nnx)(WIDTH, rngs=nnx.Rngs(key))
    trainer = model.trainer(loss=model_loss, optimizer=OPTIMIZERS["adamw"])
    loss, params = nnx_parts(key)
    check_trainer(trainer, None, loss, params, OPTIMIZERS["adamw"])
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batches(1)[0])
    placed = nnx.to_pure_dict(trainer.init(None, types).params)
    jax.tree.map(np.testing.assert_array_equal, placed, nnx.to_pure_dict(params))
    # The instance keeps the parameters that it had.
    _, kept = nnx.split(model, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, kept, params)
