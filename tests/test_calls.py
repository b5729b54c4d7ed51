"""What calls of one pipeline share, and what they must not."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxptis


def loss_fn(params, batch):
    x = batch["x"]
    for w in params["w"]:
        x = x + jnp.tanh(x @ w)
    if batch.get("mask") is not None:
        x = x * batch["mask"]
    return jnp.mean(x**2)


def make_params(widths=(8, 8, 8)):
    keys = jax.random.split(jax.random.key(0), len(widths))
    return {"w": [jax.random.normal(k, (8, n)) / 3 for k, n in zip(keys, widths, strict=True)]}


def make_batch(size=8):
    return {"x": jax.random.normal(jax.random.key(1), (size, 8))}


def make_pipeline(loss=loss_fn, num_devices=2, **options):
    return jaxptis.pipeline(
        loss,
        num_microbatches=2,
        devices=jax.devices()[:num_devices],
        **{"strategy": "1f1b", **options},
    )


def test_scalar_parameter_with_a_gradient_of_zero():
    def loss(params, x):
        y = jnp.where(x > params["threshold"], x @ params["w"], 0)
        return jnp.mean(y**2) * jax.lax.stop_gradient(params["scale"])

    params = {"w": jnp.ones((4, 4)), "threshold": jnp.float32(0.5), "scale": jnp.float32(3)}
    x = jnp.linspace(0, 1, 16).reshape(4, 4)
    got = make_pipeline(loss, num_devices=1).value_and_grad(params, x)
    # Both add the same few numbers, in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        got,
        jax.value_and_grad(loss)(params, x),
    )


@pytest.mark.parametrize("batch_axes", [0, {"x": 0, "mask": None}, {"x": 0, "mask": 0}])
def test_none_in_a_batch(batch_axes):
    params, batch = make_params(), {**make_batch(), "mask": None}
    pipelined = make_pipeline(batch_axes=batch_axes)
    loss, _ = pipelined.value_and_grad(params, batch)
    np.testing.assert_allclose(loss, loss_fn(params, batch), rtol=1e-6)


def test_state_of_another_optimizer():
    pipelined = make_pipeline()
    state = pipelined.train_step(optax.trace(0.9)).init(make_params(), make_batch())
    other = pipelined.train_step(optax.scale_by_rms())
    with pytest.raises(ValueError, match=r"the state is of another optimizer: .*TraceState"):
        other(state, make_batch())


def test_unequal_devices():
    specs = tuple(
        jaxptis.DeviceSpec(kind=kind, flops_per_s=flops, bytes_per_s=1e9)
        for kind, flops in (("slow", 1e9), ("fast", 1e11))
    )
    pipelined = make_pipeline(cluster=jaxptis.Cluster(specs))
    with pytest.raises(ValueError, match=r"the devices differ \(fast, slow\)"):
        pipelined.value_and_grad(make_params(), make_batch())


def test_devices_of_other_speed_and_memory():
    spec = jaxptis.DeviceSpec(kind="a", flops_per_s=1e9, bytes_per_s=1e9)
    slow = replace(spec, speed=0.25, memory_bytes=10**9)
    pipelined = make_pipeline(cluster=jaxptis.Cluster((spec, slow)), strategy="mist")
    params, batch = make_params((8,) * 6), make_batch()
    loss, _ = pipelined.value_and_grad(params, batch)
    np.testing.assert_allclose(loss, loss_fn(params, batch), rtol=1e-6)
    of_fast, of_slow = (len(stage.layers) for stage in pipelined.plan.stages)
    assert of_fast > of_slow


def test_a_step_without_enough_memory_is_refused_with_the_optimizers_state():
    params, batch = make_params(), make_batch()
    peaks = [curve.peak_bytes for curve in make_pipeline().compile(params, batch).timeline.memory]
    spec = jaxptis.DeviceSpec(kind="a", flops_per_s=1e9, bytes_per_s=1e9, memory_bytes=max(peaks))
    pipelined = make_pipeline(cluster=jaxptis.Cluster((spec, spec)))
    pipelined.value_and_grad(params, batch)
    with pytest.raises(ValueError, match=r"device 0 needs [\d,]+ bytes .*, but has [\d,]+; most"):
        pipelined.train_step(optax.adam(1e-3)).init(params, batch)


def table_loss(params, tokens):
    x = params["table"][tokens]
    for w in params["w"]:
        x = x + jnp.tanh(x @ w)
    return jnp.mean(x**2)


def make_table():
    """A large table that takes little time: beside its state there is room for few other layers."""
    return {"table": jnp.ones((6 * 64, 64)) / 8, "w": [jnp.eye(64) / 8] * 6}


TIGHT_BYTES = 4 * 4 * (6 + 5) * 64**2  # 11 of 12 matrices, with sums and two moments


def make_tight_pipeline(strategy="best"):
    spec = jaxptis.DeviceSpec(kind="a", flops_per_s=1e9, bytes_per_s=1e10, memory_bytes=TIGHT_BYTES)
    return make_pipeline(table_loss, cluster=jaxptis.Cluster((spec, spec)), strategy=strategy)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("gradient_first", [False, True])
def test_best_leaves_memory_for_the_optimizers_state(gradient_first):
    params, tokens, shorter = make_table(), jnp.arange(128), jnp.arange(64)
    optimizer = optax.adam(1e-2)
    of_gradient = make_tight_pipeline().compile(params, tokens).plan
    with pytest.raises(ValueError, match=r"device \d needs .*, but has .* is optimizer state"):
        make_tight_pipeline(of_gradient).train_step(optimizer).init(params, tokens)

    pipelined = make_tight_pipeline()
    if gradient_first:
        pipelined.value_and_grad(params, tokens)
        pipelined.value_and_grad(params, shorter)
        assert pipelined.plan == of_gradient
    step = pipelined.train_step(optimizer)
    state = step.init(params, tokens)
    state, metrics = step(state, tokens)
    np.testing.assert_allclose(metrics["loss"], table_loss(params, tokens), rtol=1e-6)
    assert all(x.peak_bytes <= TIGHT_BYTES for x in pipelined.timeline.memory)
    planned = pipelined.plan
    pipelined.value_and_grad(state.params, tokens)
    step.evaluate(state, tokens)
    assert pipelined.plan == planned != of_gradient
    step(state, shorter)
    assert pipelined.plan == planned


@pytest.mark.usefixtures("lenient")
def test_a_batch_that_does_not_fit_the_plan_of_the_state_is_refused():
    params, tokens, longer = make_table(), jnp.arange(128), jnp.arange(256)
    optimizer = optax.adam(1e-4)
    first = make_tight_pipeline()
    first.train_step(optimizer).init(params, longer)  # there is a plan that it does fit

    step = (pipelined := make_tight_pipeline()).train_step(optimizer)
    state, _ = step(step.init(params, tokens), tokens)
    planned = pipelined.plan
    assert planned != first.plan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"device \d needs [\d,]+ bytes .*, but has [\d,]+; "):
            step(state, longer)
        wanted = table_loss(jax.device_get(state.params), tokens)
        state, metrics = step(state, tokens)
        # The same sums in another order.
        np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-6)
    assert pipelined.plan == planned


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_traced_arguments(transform):
    pipelined = make_pipeline()
    params = jax.tree.map(lambda w: w[None], make_params())
    batch = jax.tree.map(lambda x: x[None], make_batch())
    with pytest.raises(ValueError, match=r"outside of jit, grad, vmap"):
        transform(pipelined.value_and_grad)(params, batch)


def test_another_model_has_its_own_plan():
    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def chain(*widths):
        return [jnp.ones(shape) / 100 for shape in pairwise(widths)]

    front, back = chain(8, 64, 64, 8, 8, 8), chain(8, 8, 8, 64, 64, 8)
    x = jnp.ones((8, 8))
    pipelined = make_pipeline(loss)
    first = pipelined.compile(front, x).plan
    assert first.layers == pipelined.compile(back, x).plan.layers
    assert pipelined.plan == make_pipeline(loss).compile(back, x).plan != first
    assert pipelined.compile(front, jnp.ones((16, 8))).plan == first


def test_what_is_shown_is_the_last_step(lenient):
    step = (pipelined := make_pipeline()).train_step(optax.adamw(1e-3))
    state, _ = step(step.init(make_params(), make_batch()), make_batch())
    step.evaluate(state, make_batch(4))
    count = pipelined.num_compilations
    assert "4,8" in pipelined.stages[0].forward.as_text("jaxpr")
    assert pipelined.num_compilations == count


def test_variables_of_an_nnx_model_stay_in_place():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Variable(jnp.full((8,), 2.0))
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = x + jnp.tanh(layer(x) * self.scale[...])
            return x

    def loss(model, batch):
        return jnp.mean(model(batch["x"]) ** 2)

    model = Model(nnx.Rngs(0))
    wanted = loss(model, make_batch())
    step = make_pipeline(loss).train_step(optax.sgd(0.1))
    state = step.init(model, make_batch())
    (scale,) = jax.tree.leaves(state.model_state)
    assert len(scale.sharding.device_set) == 2
    state, metrics = step(state, make_batch())
    assert jax.tree.leaves(state.model_state)[0] is scale
    # The same sums in another order.
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-6)


class Foreign:
    """An array of another framework, whose dtype is none of NumPy's."""

    dtype = "float32 of theirs"

    def __init__(self, values):
        self.shape, self._values = values.shape, values

    def __array__(self, dtype=None, copy=None):
        return self._values


def test_arrays_of_other_frameworks_are_taken():
    params, batch = make_params((8,)), jax.device_get(make_batch())
    foreign = {"x": Foreign(batch["x"])}
    pipelined = make_pipeline(num_devices=1)
    jax.tree.map(
        np.testing.assert_array_equal,
        pipelined.value_and_grad(params, foreign),
        pipelined.value_and_grad(params, batch),
    )
