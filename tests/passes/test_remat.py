"""A user's remat stays a decision: what it forbids to save is computed again in the backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.stages import Role
from tests.passes.on_host import layers_of, run_gradient
from tests.passes.small_models import NUM_BLOCKS, WIDTH, array, blocks, float_batch, mlp

STREAM = (2, WIDTH)
HIDDEN = (2, 4 * WIDTH)
policies = jax.checkpoint_policies
# What else than the stream, its input, the backward of a block may read.
POLICIES = {
    "nothing": (policies.nothing_saveable, set()),
    "default": (None, set()),
    "dots": (policies.dots_saveable, {HIDDEN}),
    "named": (policies.save_only_these_names("hidden"), {HIDDEN}),
    "unnamed": (policies.save_only_these_names("another"), set()),
}


def block(p, x):
    hidden = checkpoint_name(x @ p["up"], "hidden")
    return x + jnp.tanh(hidden + p["bias"]) @ p["down"]


def stages_of(wrapped_block):
    """Return parameters, batch, loss and stages of blocks under remat, one layer a stage."""
    params = {**blocks(), "in": array(WIDTH, WIDTH), "head": array(WIDTH, 3, seed=90)}

    def loss(p, batch):
        x = batch["x"] @ p["in"]
        for i in range(NUM_BLOCKS):
            x = wrapped_block(p[f"block{i}"], x)
        return ((x @ p["head"] - batch["y"]) ** 2).mean()

    batch = float_batch()
    graph = layers_of(loss, params, batch)
    names = [layer.name for layer in graph.layers]
    assert names == ["in", *(f"block{i}" for i in range(NUM_BLOCKS)), "head"]
    return params, batch, loss, cut_stages(graph, range(len(names) + 1))


def check_gradient(params, batch, loss, stages, gradients):
    _, sums = run_gradient(stages, gradients, params, batch)
    for got, want in zip(sums, jax.tree.leaves(jax.grad(loss)(params, batch)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # summed in another order


def saved_shapes(gradient):
    return {aval.shape for aval in gradient.forward.avals_of(Role.SAVED)}


@pytest.mark.parametrize("name", POLICIES)
def test_a_block_saves_its_input_and_what_its_policy_saves(name):
    policy, saved = POLICIES[name]
    parts = stages_of(jax.checkpoint(block, policy=policy))
    gradients = differentiate(parts[-1])
    for gradient in gradients[1:-1]:
        assert saved_shapes(gradient) == saved
        read = [x.index for x in gradient.backward.reads if x.role == Role.CROSSING]
        assert read == list(gradient.stage.inputs)
        dots = jaxprs.count_primitives(gradient.backward.jaxpr)["dot_general"]
        # Two gradients a matmul; and the first once more, unless it was saved. Nothing needs the
        # result of the second.
        assert dots == 4 + (not saved)
    check_gradient(*parts, gradients)


def test_what_no_remat_forbids_is_saved():
    parts = stages_of(block)
    for gradient in differentiate(parts[-1])[1:-1]:
        assert HIDDEN in saved_shapes(gradient)
        assert jaxprs.count_primitives(gradient.backward.jaxpr)["dot_general"] == 4


def test_a_custom_rule_inside_of_remat_stays_in_force():
    @jax.custom_vjp
    def tripled(x):
        return jnp.sin(x)

    tripled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))
    parts = stages_of(jax.checkpoint(lambda p, x: block(p, tripled(x))))
    check_gradient(*parts, differentiate(parts[-1]))


def test_remat_inside_of_remat():
    inner = jax.checkpoint(mlp)
    parts = stages_of(jax.checkpoint(lambda p, x: x + inner(p, x)))
    gradients = differentiate(parts[-1])
    assert not any(saved_shapes(gradient) for gradient in gradients[1:-1])
    check_gradient(*parts, gradients)


def linen_blocks():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(WIDTH)(jnp.tanh(nn.Dense(4 * WIDTH)(x)))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.remat(Block)()(x)
            return nn.Dense(3)(x)

    model = Model()
    params = jax.eval_shape(model.init, jax.random.key(0), float_batch()["x"])
    return params, lambda params, x: model.apply(params, x)


def nnx_blocks():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.down(jnp.tanh(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(3)])
            self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

        def __call__(self, x):
            for each in self.blocks:
                x = nnx.remat(type(each).__call__)(each, x)
            return self.head(x)

    structure, params = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    return params, lambda params, x: nnx.merge(structure, params)(x)


@pytest.mark.parametrize("make", [linen_blocks, nnx_blocks])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_the_remat_of_flax(make, wrap):
    shapes, apply = make()
    params = jax.tree.map(lambda leaf: array(*leaf.shape), shapes)
    batch = float_batch()

    def loss(params, batch):
        return ((wrap(apply)(params, batch["x"]) - batch["y"]) ** 2).mean()

    graph = layers_of(loss, params, batch)
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    gradients = differentiate(stages)
    assert len(gradients) == 4
    assert not any(saved_shapes(gradient) for gradient in gradients[:-1])
    check_gradient(params, batch, loss, stages, gradients)


def with_own_rule(loss):
    """Return a function whose gradient is twice that of `loss`."""
    wrapped = jax.custom_vjp(loss)
    wrapped.defvjp(
        lambda p, b: (loss(p, b), (p, b)),
        lambda kept, g: (
            jax.tree.map(lambda x: 2 * g * x, jax.grad(loss)(*kept)),
            jax.tree.map(jnp.zeros_like, kept[1]),
        ),
    )
    return wrapped


WHOLE = {
    "remat": jax.checkpoint,
    "remat of jit": lambda loss: jax.checkpoint(jax.jit(loss)),
    "jit of remat": lambda loss: jax.jit(jax.checkpoint(loss)),
    "custom rule": with_own_rule,
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_loss_in_one_equation_is_one_layer(name):
    params = {**blocks(), "head": array(WIDTH, 3, seed=90)}

    def loss(p, batch):
        x = functools.reduce(lambda x, i: block(p[f"block{i}"], x), range(NUM_BLOCKS), batch["x"])
        return ((x @ p["head"] - batch["y"]) ** 2).mean()

    whole, batch = WHOLE[name](loss), float_batch()
    graph = layers_of(whole, params, batch)
    assert len(graph.layers) == 1
    stages = cut_stages(graph, [0, 1])
    gradients = differentiate(stages)
    if name != "custom rule":
        assert not saved_shapes(gradients[0])
    check_gradient(params, batch, whole, stages, gradients)
