"""A small model of dense layers with residuals, and comparisons of trees of arrays."""

import jax
import jax.numpy as jnp
import numpy as np

IN, WIDTH, HIDDEN, OUT = 3, 16, 64, 2


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def matrix(seed, rows, columns):
    return normal(seed, rows, columns) / np.float32(np.sqrt(rows))


def block_params(seed):
    return {
        "up": matrix(2 * seed, WIDTH, HIDDEN),
        "down": matrix(2 * seed + 1, HIDDEN, WIDTH) / 2,
    }


def make_params(num_blocks=2):
    """Return the parameters of `num_blocks` + 2 layers: first, blocks/0, blocks/1, ..., head."""
    blocks = [block_params(seed) for seed in range(num_blocks)]
    return {"first": matrix(99, IN, WIDTH), "blocks": blocks, "head": matrix(100, WIDTH, OUT)}


def make_batch(size=8, seed=200):
    return {"x": normal(seed, size, IN), "y": normal(seed + 1, size, OUT)}


def block(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def loss_fn(params, batch):
    x = batch["x"] @ params["first"]
    for p in params["blocks"]:
        x = block(p, x)
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


def assert_close(got, want, *, rtol):
    """Compare two trees of equal structure and dtypes; `rtol` is of the largest value of all.

    Equal sums in another order differ by some 1e-7 of what is summed, in float32, not of what is
    left after cancellation: so errors are measured against the tree's largest value.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    paths = jax.tree_util.tree_leaves_with_path(want)
    scale = max((float(np.max(np.abs(leaf), initial=0)) for _, leaf in paths), default=0)
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=0,
            atol=rtol * scale,
            err_msg=jax.tree_util.keystr(path),
        )
