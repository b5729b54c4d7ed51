"""Loops over layers are unrolled, whatever they carry and stack; other loops stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import jaxprs
from passes.inline_calls import inline_calls
from passes.peel_scans import peel_scans
from passes.trace import trace
from tests.passes.on_host import parts_of, types

LAYERS, WIDTH = 3, 4
LOOPS: dict[str, tuple] = {}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "w": normal(0, LAYERS, WIDTH, WIDTH),
    "wide": normal(1, WIDTH, 2, LAYERS, WIDTH),  # layers on axis 2
    "b": normal(2, LAYERS, WIDTH),
    "shared": normal(3, WIDTH, WIDTH),
}
BATCH = {"x": normal(4, 2, WIDTH), "key": jax.random.key(5), "times": normal(6, LAYERS, WIDTH)}
TABLE = np.linspace(-1.0, 1.0, WIDTH, dtype=np.float32)


def loop(*, scans=0, **counts):
    """Register a loss, the scans that are left of it, and the counts of other primitives."""

    def register(loss):
        LOOPS[loss.__name__] = loss, {"scan": scans, **counts}
        return loss

    return register


def dense(x, w):
    return x + jnp.tanh(x @ w)


@loop(dot_general=LAYERS)
def plain(p, batch):
    return jax.lax.scan(lambda x, w: (dense(x, w), None), batch["x"], p["w"])[0].sum()


@loop(dot_general=LAYERS + 1)
def backwards_with_several_results(p, batch):
    def body(carry, xs):
        x, total, count = carry
        y = dense(x, xs["w"]) + xs["b"]
        return (y, total + jnp.mean(y**2), count + 1), (jnp.mean(y), y[0], xs["b"])

    start = (batch["x"], jnp.float32(0), 0)
    xs = {"w": p["w"], "b": p["b"]}
    (x, total, count), (means, rows, bs) = jax.lax.scan(body, start, xs, reverse=True)
    last = jnp.sum(x) + total * count + means @ jnp.arange(1.0, LAYERS + 1)
    return last + rows[0].sum() + bs[1].sum()


@loop(dot_general=2 * LAYERS)
def stacked_on_another_axis_and_cast(p, batch):
    stack = jnp.moveaxis(p["wide"].astype(jnp.bfloat16), 2, 0).reshape(LAYERS, WIDTH, 2 * WIDTH)

    def body(x, w):
        w = w.astype(jnp.float32)
        return jnp.tanh(x @ w[:, :WIDTH]) @ w[:, WIDTH:], None

    return jax.lax.scan(body, batch["x"], stack)[0].sum()


@loop(dot_general=LAYERS, remat2=LAYERS)
def remat_with_a_call_inside(p, batch):
    body = jax.checkpoint(jax.jit(lambda x, w: (dense(x, w), None)))
    return jax.lax.scan(body, batch["x"], p["w"])[0].sum()


@loop(dot_general=LAYERS, jit=0)
def call_in_the_body_and_around(p, batch):
    @jax.jit
    def model(x, w):
        return jax.lax.scan(lambda x, w: (jax.jit(dense)(x, w), None), x, w)[0]

    return model(batch["x"], p["w"]).sum()


@loop(dot_general=LAYERS)
def keys_of_the_batch_and_constants(p, batch):
    mask = batch["x"] > 0
    table = jnp.asarray(TABLE)

    def body(x, xs):
        w, key = xs
        kept = jax.random.bernoulli(key, 0.7, x.shape) | mask
        return jnp.where(kept, dense(x, w), 0) + table, None

    keys = jax.random.split(batch["key"], LAYERS)
    return jax.lax.scan(body, batch["x"], (p["w"], keys))[0].sum()


@loop(dot_general=LAYERS)
def weights_times_a_constant(p, batch):
    weights = p["w"] * np.linspace(-1, 1, p["w"].size, dtype=np.float32).reshape(p["w"].shape)
    return jax.lax.scan(lambda x, w: (dense(x, w), None), batch["x"], weights)[0].sum()


@loop(dot_general=2 * LAYERS)
def groups_of_layers(p, batch):
    groups = jnp.stack([p["w"], 2 * p["w"]])

    def group(x, ws):
        return jax.lax.scan(lambda x, w: (dense(x, w), None), x, ws)[0], None

    return jax.lax.scan(group, batch["x"], groups)[0].sum()


@loop(dot_general=2 * LAYERS)
def in_a_branch(p, batch):
    def body(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: dense(x, w), lambda: x - x @ w), None

    return jax.lax.scan(body, batch["x"], p["w"])[0].sum()


@loop(scans=1)
def over_time(p, batch):
    def body(h, x):
        return jnp.tanh(h @ p["shared"] + x), None

    return jax.lax.scan(body, batch["x"], batch["times"])[0].sum()


@loop(scans=1)
def over_time_with_positions(p, batch):
    def body(h, xs):
        x, position = xs
        return jax.checkpoint(lambda h, b: jnp.tanh((h + b) @ p["shared"] + x))(h, position), None

    return jax.lax.scan(body, batch["x"], (batch["times"], p["b"]))[0].sum()


@loop(scans=1)
def shared_weights(p, batch):
    x = batch["x"]
    return jax.lax.scan(lambda x, _: (dense(x, p["shared"]), None), x, length=LAYERS)[0].sum()


@loop(scans=1)
def sum_over_experts(p, batch):
    def body(total, w):
        return total + jnp.tanh(batch["x"] @ w), None

    return jax.lax.scan(body, jnp.zeros((2, WIDTH)), p["w"])[0].sum()


@loop(scans=1)
def microbatches(p, batch):
    def body(total, x):
        return total + jnp.mean(dense(x, p["shared"])), None

    return jax.lax.scan(body, jnp.float32(0), batch["times"])[0]


@functools.cache
def traced(name):
    return inline_calls(trace(LOOPS[name][0], types(PARAMS), types(BATCH), has_aux=False)[0])


@functools.cache
def peeled(name):
    return peel_scans(traced(name))


def value_and_grad(program):
    def loss(params):
        args = [*program.constants, *parts_of(program, params), *jax.tree.leaves(BATCH)]
        return jaxprs.evaluate(program.jaxpr, args)[0]

    return jax.jit(jax.value_and_grad(loss))(PARAMS)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.usefixtures("optimized")
def test_loss_and_gradients_stay(name):
    after = peeled(name)
    after.check()
    assert after.sources == traced(name).sources
    got, want = value_and_grad(after), value_and_grad(traced(name))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # The same arithmetic, which XLA fuses in another way.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOOPS)
def test_only_layer_loops_are_unrolled(name):
    counts = jaxprs.count_primitives(peeled(name).jaxpr)
    wanted = LOOPS[name][1]
    assert {key: counts.get(key, 0) for key in wanted} == wanted
    if wanted["scan"]:
        assert peeled(name) is traced(name)


@pytest.mark.parametrize("name", LOOPS)
def test_applied_twice_is_applied_once(name):
    assert peel_scans(peeled(name)) is peeled(name)
