import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models import MODELS

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
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
