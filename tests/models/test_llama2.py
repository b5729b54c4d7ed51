import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama2 import SIZES, Llama2
from models.parts.rope import rotate
from tests.models.small import LLAMA2 as SMALL

TOKENS_BT = np.random.default_rng(0).integers(0, 256, size=(2, 12)).astype(np.int32)


def init(config):
    """Parameters of the model, every one moved off its initial value."""
    params = Llama2(config).init(jax.random.key(0), TOKENS_BT)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


# Counted by hand from the shapes; the sums are those of the published checkpoints.
@pytest.mark.parametrize(
    ("size", "count"), [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("70B", 68_976_648_192)]
)
def test_published_sizes_have_the_published_number_of_parameters(size, count):
    params = jax.eval_shape(Llama2(SIZES[size]).init, jax.random.key(0), TOKENS_BT)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_no_position_sees_a_later_token():
    params, t = init(SMALL), 7
    changed_BT = TOKENS_BT.copy()
    changed_BT[:, t] = (changed_BT[:, t] + 1) % 256
    before, after = (Llama2(SMALL).apply(params, x) for x in (TOKENS_BT, changed_BT))
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert (np.abs(before[:, t:] - after[:, t:]).max(-1) > 1e-4).all()


def test_grouped_queries_equal_repeated_key_value_heads():
    params = init(SMALL)
    grouped = Llama2(SMALL).apply(params, TOKENS_BT)

    def repeat(path, leaf):
        shared = any(f"'{name}'" in jax.tree_util.keystr(path) for name in ("key", "value"))
        return jnp.repeat(leaf, SMALL.num_heads // SMALL.num_kv_heads, axis=1) if shared else leaf

    full = dataclasses.replace(SMALL, num_kv_heads=SMALL.num_heads)
    repeated = Llama2(full).apply(jax.tree_util.tree_map_with_path(repeat, params), TOKENS_BT)
    # The same sums, in another order.
    np.testing.assert_allclose(grouped, repeated, rtol=1e-5, atol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    q_H, k_H = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    q_TH, k_TH = (rotate(jnp.tile(x, (1, 20, 1, 1)), 10_000.0)[0, :, 0] for x in (q_H, k_H))
    products_TS = q_TH @ k_TH.T
    for distance in (-15, -1, 0, 4):
        along = np.diagonal(products_TS, distance)
        np.testing.assert_allclose(along, along[0], atol=1e-4)  # float32 angles up to 20
    np.testing.assert_allclose(products_TS[0, 0], q_H @ k_H, rtol=1e-5)
    assert np.ptp(products_TS[0]) > 1
