import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import MODELS
from tests.small_models import assert_close

EVERY_SIZE = [(model, size) for model in MODELS for size in MODELS[model].sizes]


@pytest.mark.parametrize(("name", "size"), EVERY_SIZE)
def test_every_size_maps_tokens_to_logits_in_its_own_types(name, size):
    model = MODELS[name]
    config = dataclasses.replace(model.sizes[size], param_dtype=jnp.bfloat16)
    tokens_BT = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    logits_BTV, params = jax.eval_shape(
        model.module(config).init_with_output, jax.random.key(0), tokens_BT
    )
    assert logits_BTV.shape == (2, 8, config.vocab_size)
    assert logits_BTV.dtype == config.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # A router's bias steps by less than bfloat16 resolves.
        is_bias = "router" in str(path) and "bias" in str(path)
        assert leaf.dtype == (jnp.float32 if is_bias else jnp.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_computing_in_16_bits_changes_loss_and_gradients_little(name, lenient):
    model, single = MODELS[name], MODELS[name].sizes["tiny"]
    half = dataclasses.replace(single, dtype=jnp.bfloat16)
    assert single.dtype == single.param_dtype == half.param_dtype == jnp.float32
    tokens_BT = np.random.default_rng(0).integers(0, single.vocab_size, (2, 18)).astype(np.int32)
    params = jax.jit(model.module(single).init)(jax.random.key(0), tokens_BT)["params"]

    def value_and_grad(config):
        def loss_fn(params):
            apply = functools.partial(model.module(config).apply, {"params": params})
            return model.loss(config)(apply, {"tokens": tokens_BT})

        (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
        assert {leaf.dtype for leaf in jax.tree.leaves((loss, grads))} == {jnp.dtype(jnp.float32)}
        return loss, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    (expected, expected_grads), (loss, grads) = value_and_grad(single), value_and_grad(half)
    # bfloat16 rounds to 0.4 percent, some ten times in a row; some tokens choose other experts.
    np.testing.assert_allclose(loss, expected, rtol=0.02)
    assert np.linalg.norm(grads - expected_grads) < 0.2 * np.linalg.norm(expected_grads)


def saved_bytes(loss_fn, params):
    """What the backward is left by the forward, beside the parameters."""
    backward = jax.eval_shape(lambda params: jax.vjp(loss_fn, params, has_aux=True)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize("name", MODELS)
def test_remat_saves_memory_and_changes_nothing(name, lenient):
    model, config = MODELS[name], MODELS[name].sizes["tiny"]
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 18)).astype(np.int32)
    batch = {"tokens": tokens_BT}
    params = jax.jit(model.module(config).init)(jax.random.key(0), tokens_BT)["params"]

    def loss_of(remat):
        module = model.module(dataclasses.replace(config, remat=remat))
        return lambda p: model.loss(config)(functools.partial(module.apply, {"params": p}), batch)

    plain, again = loss_of(remat=False), loss_of(remat=True)
    assert saved_bytes(again, params) < 0.8 * saved_bytes(plain, params)
    expected, grads = (jax.jit(jax.grad(loss, has_aux=True))(params)[0] for loss in (plain, again))
    assert_close(grads, expected, rtol=1e-5)
