"""Models whose layers are stacked in a scan are cut inside of it, and train as plain JAX does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxptis
from tests.small_models import HIDDEN, IN, OUT, WIDTH, assert_close, make_batch, normal

LAYERS = 4
RTOL = 1e-5  # float32 sums in another order
KEY = jax.random.key(3)

pytestmark = pytest.mark.usefixtures("lenient")


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        y = linen.Dense(HIDDEN)(x)
        return x + linen.Dense(WIDTH)(jnp.tanh(y)), None


class Linen(linen.Module):
    axis: int = 0
    remat: bool = False

    @linen.compact
    def __call__(self, x):
        block = linen.remat(Block, prevent_cse=False) if self.remat else Block
        stack = linen.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = stack(name="blocks")(linen.Dense(WIDTH, name="first")(x), None)
        return linen.Dense(OUT, name="head")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return NnxBlock(rngs)

        self.first = nnx.Linear(IN, WIDTH, rngs=rngs)
        self.blocks = make(rngs)
        self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return self.head(forward(self.first(x), self.blocks))


def model_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def linen_model(**options):
    model = Linen(**options)
    params = model.init(KEY, make_batch()["x"])["params"]
    loss = lambda p, b: model_loss(functools.partial(model.apply, {"params": p}), b)  # noqa: E731
    return loss, params


def nnx_model():
    graphdef, params = nnx.split(Nnx(rngs=nnx.Rngs(KEY)), nnx.Param)
    return lambda p, b: model_loss(nnx.merge(graphdef, p), b), params


MODELS = {
    "axis 0": linen_model,
    "axis 1": functools.partial(linen_model, axis=1),
    "remat": functools.partial(linen_model, remat=True),
    "nnx": nnx_model,
}


@functools.cache
def model(name):
    return MODELS[name]()


def perturbed(params, seed):
    """Return parameters none of which is zero, as biases are at first."""
    return jax.tree.map(lambda x: x + 0.1 * normal(seed, *x.shape), params)


def make_pipelined(loss, num_devices):
    return jaxptis.pipeline(
        loss, strategy="1f1b", num_microbatches=4, devices=jax.devices()[:num_devices]
    )


def is_parts(leaf):
    return isinstance(leaf, jaxptis.Parts)


def check_bytes(tree, num_devices):
    """Check that every device holds a part of each stack, and of it nothing else."""
    stacks = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_parts) if is_parts(leaf)]
    assert stacks
    for stack in stacks:
        held = dict.fromkeys(jax.devices()[:num_devices], 0)
        for part in stack.arrays:
            (device,) = part.devices()
            held[device] += part.nbytes
        size = np.prod(stack.shape) * stack.dtype.itemsize
        assert list(held.values()) == [size / num_devices] * num_devices


@pytest.mark.parametrize(
    ("name", "num_devices"), [("axis 0", 2), ("axis 0", 4), ("axis 1", 4), ("remat", 2), ("nnx", 4)]
)
def test_gradients_are_those_of_plain_jax(name, num_devices):
    loss, params = model(name)
    pipelined = make_pipelined(loss, num_devices)
    plain = jax.jit(jax.value_and_grad(loss))
    for seed in 1, 2:  # with new values: nothing of the first call may stay
        values, batch = perturbed(params, seed), make_batch(seed=seed)
        got = pipelined.value_and_grad(values, batch)
        assert_close(got, plain(values, batch), rtol=RTOL)
    # As NumPy arrays, and in parts.
    on_host = jax.tree.map(np.asarray, values)
    assert_close(pipelined.value_and_grad(on_host, batch), got, rtol=0)
    state = pipelined.train_step(optax.sgd(0.1)).init(values, batch)
    check_bytes(state.params, num_devices)
    count = pipelined.num_compilations
    value, grads = pipelined.value_and_grad(state.params, batch)
    assert pipelined.num_compilations == count
    assert jax.tree.structure(grads) == jax.tree.structure(state.params)
    assert_close((value, jaxptis.whole(grads)), got, rtol=0)
    per_device = LAYERS // num_devices
    names = [f"blocks[{k}]" if name != "axis 1" else "" for k in range(LAYERS)]
    for device, stage in enumerate(pipelined.plan.stages if name != "axis 1" else ()):
        expected = names[device * per_device : (device + 1) * per_device]
        assert [layer for layer in stage.layers if layer.startswith("blocks")] == expected


CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=1e-4))


def check_training(trainer, loss, params, optimizer, num_devices):
    """Train from the parameters that the trainer draws, and plainly from `params`."""
    data = [make_batch(seed=2 * k) for k in range(10)]
    state = trainer.init(KEY, data[0])
    assert_close(jaxptis.whole(state.params), params, rtol=1e-6)  # from the same bits
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for batch in data:
        evaluated = trainer.evaluate(state, batch)["loss"]
        state, metrics = trainer.step(state, batch)
        params, opt_state, value = step(params, opt_state, batch)
        np.testing.assert_allclose([evaluated, metrics["loss"]], [value, value], rtol=RTOL)
        check_bytes((state.params, state.opt_state), num_devices)
    assert_close(jaxptis.whole(state.params), params, rtol=RTOL)
    whole_state = jaxptis.whole(state.opt_state)
    assert jax.tree.structure(whole_state) == jax.tree.structure(opt_state)
    for got, want in zip(jax.tree.leaves(whole_state), jax.tree.leaves(opt_state), strict=True):
        assert_close(got, want, rtol=RTOL)


def decorate(cls, num_devices):
    devices = jax.devices()[:num_devices]
    return jaxptis.pipeline(cls, strategy="1f1b", num_microbatches=4, devices=devices)


def test_training_linen():
    loss, params = model("axis 1")
    trainer = decorate(Linen, 4)(axis=1).trainer(loss=model_loss, optimizer=CLIPPED)
    check_training(trainer, loss, params, CLIPPED, 4)


def test_training_nnx():
    loss, params = model("nnx")
    optimizer = optax.adamw(1e-2, eps=1e-4)
    trainer = decorate(Nnx, 2).trainer(loss=model_loss, optimizer=optimizer)
    check_training(trainer, loss, params, optimizer, 2)


def test_parts_as_an_array():
    array = np.arange(12.0).reshape(3, 4)
    parts = jaxptis.Parts([array[:1], array[1:]], (((0, 1), (0, 4)), ((1, 3), (0, 4))), (3, 4))
    assert (parts.shape, parts.dtype, parts.ndim) == (array.shape, array.dtype, 2)
    np.testing.assert_array_equal(np.asarray(parts), array)
    doubled = jax.tree.map(lambda x: 2 * x, {"a": parts, "b": 1})
    np.testing.assert_array_equal(jaxptis.whole(doubled)["a"], 2 * array)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(doubled)]
    assert paths == ["['a']['[0]']", "['a']['[1:3]']", "['b']"]
