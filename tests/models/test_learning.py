"""Every `tiny` learns the text; tests/models/test_training.py has that a pipeline does likewise."""

import functools

import jax
import numpy as np
import optax
import pytest

from experiments.corpus import as_bytes, load_corpus, sample_batch, spread_batches
from models import MODELS

NUM_STEPS = 40
SIZE = {"batch_size": 16, "sequence_length": 64}


@functools.cache
def corpus():
    return load_corpus(as_bytes)


def entropy():
    """What is the least loss, in nats, for a model that knows how common each byte is, no more."""
    shares = np.bincount(corpus().training) / corpus().training.size
    shares = shares[shares > 0]
    return -(shares * np.log(shares)).sum()


@pytest.mark.parametrize("name", MODELS)
def test_the_tiny_one_learns_the_text(name, lenient, optimized):
    model, config = MODELS[name], MODELS[name].sizes["tiny"]
    module = model.module(config)
    optimizer = model.steer(optax.adamw(3e-3))

    def loss_fn(params, batch):
        return model.loss(config)(functools.partial(module.apply, {"params": params}), batch)

    @jax.jit
    def step(params, opt_state, batch):
        grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    (held_out,) = spread_batches(corpus().evaluation, 1, **SIZE)
    params = jax.jit(module.init)(jax.random.key(0), held_out["tokens"])["params"]
    opt_state = jax.jit(optimizer.init)(params)
    random = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        params, opt_state = step(params, opt_state, sample_batch(corpus().training, random, **SIZE))
    loss, cross_entropy = jax.jit(loss_fn)(params, held_out)
    assert cross_entropy <= loss
    assert cross_entropy < 0.95 * entropy()  # by what stands before a byte
