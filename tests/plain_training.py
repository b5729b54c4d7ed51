"""Training steps beside plain optax steps."""

import jax
import numpy as np
import optax

from tests.small_models import assert_close, make_batch

NUM_STEPS = 10
CLIP_NORM = 1.0
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    # The norm is well above the limit (a test looks), so the gradients of all stages must meet.
    "clipped": optax.chain(
        optax.clip_by_global_norm(CLIP_NORM), optax.adamw(1e-2, eps=1e-4, weight_decay=0.1)
    ),
}


# Float32 sums in another order: 1e-7 a step, and Adam divides by the root of small numbers.
RTOL = 1e-5


def batches(num_steps=NUM_STEPS):
    return [make_batch(seed=1000 + 2 * step) for step in range(num_steps)]


def train_plainly(loss, optimizer, params, data):
    """Return parameters, optimizer state and losses after a plain loop over `data`."""

    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = optimizer.init(params), []
    for batch in data:
        params, opt_state, value = step(params, opt_state, batch)
        losses.append(float(value))
    return params, opt_state, losses


def check_steps(step, state, loss, optimizer, params, data):
    """Take a step per batch, compare with a plain loop from `params`; return the last state."""
    losses = []
    for batch in data:
        state, metrics = step(state, batch)
        assert metrics.keys() == {"loss"}
        losses.append(float(metrics["loss"]))
    wanted_params, wanted_state, wanted_losses = train_plainly(loss, optimizer, params, data)
    assert state.step == len(data)
    assert_close(state.params, wanted_params, rtol=RTOL)
    for got, want in zip(
        by_moment(state.opt_state), by_moment(wanted_state), strict=True
    ):  # second moments are squares, so each has its own scale
        assert_close(got, want, rtol=RTOL)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(wanted_state)
    np.testing.assert_allclose(losses, wanted_losses, rtol=RTOL)
    return state


def by_moment(opt_state):
    adam = find_adam(opt_state)
    rest = jax.tree.map(
        lambda x: () if isinstance(x, optax.ScaleByAdamState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState),
    )
    return adam.count, adam.mu, adam.nu, rest


def find_adam(opt_state):
    (adam,) = (
        leaf
        for leaf in jax.tree.leaves(
            opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if isinstance(leaf, optax.ScaleByAdamState)
    )
    return adam


def device_sets(tree):
    return jax.tree.map(lambda leaf: leaf.sharding.device_set, tree)


def sharding_devices(leaf):
    return leaf.sharding.device_set
