"""Modules that compute in 16 bits add up in 32 what comes from many positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.parts.embed import Embed
from models.parts.mamba import Convolution, GatedNorm
from models.parts.norm import RMSNorm
from tests.models.small import NEMOTRON_H

B, T, D = 1, 2048, 24
MODULES = {
    "embedding": Embed,
    "norm": RMSNorm,
    "norm around one": lambda config: RMSNorm(config, around_one=True),
    "convolution": Convolution,
    "gated norm": GatedNorm,
}


def half(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.bfloat16)


def make_inputs(name):
    if name == "embedding":  # of a few tokens that come often
        return [np.random.default_rng(0).integers(0, 4, size=(B, T))]
    return [half((B, T, D), seed) for seed in range(2 if name == "gated norm" else 1)]


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_parameters_are_those_of_32_bits(name):
    inputs = make_inputs(name)

    def value_and_grads(dtype):
        module = MODULES[name](dataclasses.replace(NEMOTRON_H, dtype=dtype))
        own = [x if name == "embedding" else jnp.asarray(x, dtype) for x in inputs]
        params = module.init(jax.random.key(0), *own)["params"]

        def loss(params):
            out = module.apply({"params": params}, *own)
            assert out.dtype == dtype
            cotangent = half(out.shape, 9).astype(np.float32)
            return (out.astype(jnp.float32) * cotangent).sum(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        return out, grads

    (exact, expected), (out, grads) = map(value_and_grads, (jnp.float32, jnp.bfloat16))
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))  # rounded once, at the end
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert found.dtype == jnp.float32
        # The same float32 sums, perhaps in another order.
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * scale)
