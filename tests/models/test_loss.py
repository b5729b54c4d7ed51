import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama2 import SIZES, Llama2
from models.loss import next_token_loss
from tests.small_models import assert_close


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_loss_is_the_mean_cross_entropy_of_the_next_token(offset):
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(size=(2, 5, 7)) + offset
    tokens = rng.integers(0, 7, size=(2, 6))
    seen = []

    def model(tokens_BT):
        seen.append(np.asarray(tokens_BT))
        return jnp.asarray(logits_BTV, jnp.float32)

    loss = next_token_loss(model, {"tokens": jnp.asarray(tokens, jnp.int32)})

    shifted = logits_BTV - logits_BTV.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    expected = -np.mean([np.log(probs[b, t, tokens[b, t + 1]]) for b in range(2) for t in range(5)])
    # Near 1e4, float32 logits are 1e-3 apart.
    np.testing.assert_allclose(loss, expected, rtol=1e-6 if offset == 0 else 1e-3)
    np.testing.assert_array_equal(seen[0], tokens[:, :-1])


def test_loss_of_low_precision_logits_is_float32():
    loss = next_token_loss(
        lambda tokens_BT: jnp.zeros((*tokens_BT.shape, 256), jnp.bfloat16),
        {"tokens": jnp.zeros((1, 4), jnp.int32)},
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(256), rtol=1e-6)


D, V = 6, 50
TOKENS = np.random.default_rng(1).integers(0, V, size=(2, 6)).astype(np.int32)


def factors(dtype=jnp.float32):
    """Parameters of a model that is an embedding and a head."""
    embedding, kernel = np.random.default_rng(2).normal(size=(2, V, D))
    return {"embedding": jnp.asarray(embedding, dtype), "kernel": jnp.asarray(kernel.T, dtype)}


def loss_of(params, tokens, head_slices, dtype=jnp.float32):
    def model(tokens_BT, *, before_head=False):
        x_BTD = params["embedding"][tokens_BT].astype(dtype)
        return (x_BTD, params["kernel"]) if before_head else x_BTD @ params["kernel"].astype(dtype)

    return next_token_loss(model, {"tokens": tokens}, head_slices=head_slices)


def value_and_grad(params, tokens, head_slices, **options):
    loss = functools.partial(loss_of, head_slices=head_slices, **options)
    return jax.jit(jax.value_and_grad(loss))(params, jnp.asarray(tokens))


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("num_slices", [2, 7])
def test_slices_of_the_head_give_loss_and_gradients_of_the_whole(num_slices, scale):
    params = factors()
    params["kernel"] *= scale
    wanted, got = (value_and_grad(params, TOKENS, k) for k in (1, num_slices))
    assert np.isfinite(wanted[0])
    # The same float32 sums in another order.
    assert_close(got[0], wanted[0], rtol=1e-5)
    assert_close(got[1], wanted[1], rtol=1e-5)


@pytest.mark.parametrize("target", [-1, -V - 1, V])
def test_targets_outside_of_the_vocabulary_in_slices(target):
    tokens = TOKENS.copy()
    tokens[0, -1] = target  # predicted, and never read
    wanted, got = (value_and_grad(factors(), tokens, k) for k in (1, 3))
    assert np.isnan(wanted[0]) == (target != -1)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6, equal_nan=True)
    assert_close(got[1], wanted[1], rtol=1e-5)


def test_bfloat16_logits_in_slices():
    wanted, got = (value_and_grad(factors(), TOKENS, k, dtype=jnp.bfloat16) for k in (1, 4))
    assert got[0].dtype == jnp.float32
    assert_close(got[0], wanted[0], rtol=1e-5)
    # Gradients of the hidden states are sums of four bfloat16s, each of 8 bits.
    assert_close(got[1], wanted[1], rtol=4 * 2**-8)


def test_slices_of_the_head_of_a_model_that_makes_logits():
    config = dataclasses.replace(
        SIZES["tiny"], vocab_size=V, model_width=8, mlp_width=8, num_blocks=1, num_heads=2
    )
    model = Llama2(config)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)

    def loss(params, head_slices):
        batch = {"tokens": jnp.asarray(TOKENS)}
        apply = functools.partial(model.apply, params)
        return next_token_loss(apply, batch, head_slices=head_slices)

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    wanted, got = (value_and_grad(params, k) for k in (1, 4))
    assert_close(got[0], wanted[0], rtol=1e-5)
    assert_close(got[1], wanted[1], rtol=1e-5)


@pytest.mark.parametrize("num_slices", [0, -1, V + 1])
def test_a_wrong_number_of_slices(num_slices):
    with pytest.raises(ValueError, match=f"{num_slices} slices of a vocabulary of {V}; use 1 to"):
        loss_of(factors(), jnp.asarray(TOKENS), num_slices)
