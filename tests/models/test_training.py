"""Every family trains through a pipeline as it does plainly."""

import functools

import jax
import numpy as np
import optax
import pytest

import jaxptis
from models import MODELS, next_token_loss
from tests.small_models import assert_close

NUM_STEPS = 10
B, T = 8, 7  # T is no multiple of a chunk
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
STRATEGIES = ("1f1b", "interleaved", "zb-h1")

pytestmark = pytest.mark.usefixtures("lenient", "compiled_quickly")


def batches(vocab_size):
    random = np.random.default_rng(0)
    shape = NUM_STEPS, B, T + 1
    return [{"tokens": tokens} for tokens in random.integers(0, vocab_size, shape, np.int32)]


@functools.cache
def plain_step(name):
    module = MODELS[name].module(MODELS[name].sizes["tiny"])

    @jax.jit
    def step(params, opt_state, batch):
        def loss_fn(params):
            return next_token_loss(functools.partial(module.apply, {"params": params}), batch)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_equal_plain_ones(name, strategy):
    model = MODELS[name]
    pipeline = jaxptis.pipeline(num_microbatches=4, devices=jax.devices()[:2], strategy=strategy)
    trainer = pipeline(model.module)(model.sizes["tiny"]).trainer(
        loss=next_token_loss, optimizer=OPTIMIZER
    )
    data = batches(model.sizes["tiny"].vocab_size)
    state = trainer.init(jax.random.key(0), data[0])
    params = jax.device_get(state.params)
    opt_state = OPTIMIZER.init(params)
    for batch in data:
        state, metrics = trainer.step(state, batch)
        params, opt_state, loss = plain_step(name)(params, opt_state, batch)
        # Sums in float32, in another order; the differences grow with the steps.
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(state.params, params, rtol=1e-5)
