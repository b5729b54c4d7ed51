"""A pipeline is called as the plain function is: shapes, batch axes, keys, types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxptis
from tests.small_models import (
    IN,
    WIDTH,
    assert_close,
    block,
    loss_fn,
    make_batch,
    make_params,
    matrix,
    normal,
)
from tests.small_pipelines import RTOL, check, make_pipelined


def microbatches(batch, count):
    """Return the microbatches of a batch whose leaves all have axis 0."""
    return [
        jax.tree.map(lambda x, m=m: x[m * len(x) // count : (m + 1) * len(x) // count], batch)
        for m in range(count)
    ]


def test_new_weights_data_and_shapes():
    pipelined = make_pipelined()
    check(pipelined, loss_fn, make_params(2), make_batch())
    plan, compiled = pipelined.plan, pipelined.num_compilations
    doubled = jax.tree.map(lambda x: 2 * x, make_params(2))
    check(pipelined, loss_fn, doubled, make_batch(seed=300))
    assert pipelined.num_compilations == compiled
    check(pipelined, loss_fn, make_params(2), make_batch(size=12))
    assert pipelined.num_compilations > compiled
    assert pipelined.plan == plan
    compiled = pipelined.num_compilations
    check(pipelined, loss_fn, make_params(2), make_batch())
    assert pipelined.num_compilations == compiled


def test_compile_from_types():
    def types(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    pipelined = make_pipelined()
    with pytest.raises(ValueError, match="call compile first"):
        _ = pipelined.plan
    assert pipelined.compile(types(make_params(1)), types(make_batch())) is pipelined
    compiled = pipelined.num_compilations
    check(pipelined, loss_fn, make_params(1), make_batch())
    assert pipelined.num_compilations == compiled


def test_decorated_function():
    """By default on all devices; eight layers fill them."""

    @jaxptis.pipeline(strategy="1f1b", num_microbatches=2)
    def loss(params, batch):
        return loss_fn(params, batch)

    value = loss.evaluate(make_params(6), make_batch())
    assert_close(value, loss_fn(make_params(6), make_batch()), rtol=RTOL)
    assert loss.plan.num_stages == len(jax.devices()) == 8


@pytest.mark.parametrize("batch_axes", [0, {"x": 0, "y": 0}, {"x": 0, "y": -2}])
def test_batch_axes(batch_axes):
    pipelined = make_pipelined(batch_axes=batch_axes)
    check(pipelined, loss_fn, make_params(1), make_batch())


def test_batch_axes_of_parts():
    """One axis for a whole subtree, None for another, and axes from behind."""

    def loss(params, batch):
        data, scale = batch["data"], batch["scale"]
        x = data["x"].T * scale["in"]
        return loss_fn(params, {"x": x, "y": data["y"].T}) * scale["out"]

    batch = make_batch()
    batch = {
        "data": {"x": batch["x"].T, "y": batch["y"].T},
        # Not an array: JAX takes Python's numbers too.
        "scale": {"in": normal(3, IN), "out": 3.0},
    }
    for axis in 1, -1:
        pipelined = make_pipelined(loss, batch_axes={"data": axis, "scale": None})
        check(pipelined, loss, make_params(1), batch)


def test_batch_axes_none():
    """Every microbatch is the whole batch, so the mean over them is that of one."""
    pipelined = make_pipelined(batch_axes=None)
    check(pipelined, loss_fn, make_params(1), make_batch(size=3))


def noisy_loss(params, batch):
    key = batch["key"] if jnp.issubdtype(batch["key"].dtype, jax.dtypes.prng_key) else None
    if key is None:  # raw keys, those of this microbatch
        (key,) = batch["key"]
    if key.shape == (1,):
        (key,) = key
    x = batch["x"] @ params["first"]
    for i, p in enumerate(params["blocks"]):
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, x.shape)
        x = block(p, jnp.where(keep, x, 0.0))
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


KEYS = {
    "a raw key a microbatch": (np.arange(8, dtype=np.uint32).reshape(4, 2), 0),
    "a typed key a microbatch": (functools.partial(jax.random.split, num=4), 0),
    "one typed key for all": (lambda key: key, None),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_in_the_batch(case):
    keys, axis = KEYS[case]
    keys = keys(jax.random.key(11)) if callable(keys) else keys
    params, data = make_params(1), make_batch()
    pipelined = make_pipelined(
        noisy_loss, num_microbatches=4, batch_axes={"x": 0, "y": 0, "key": axis}
    )
    value, grads = pipelined.value_and_grad(params, data | {"key": keys})

    def plain(params):
        losses = [
            noisy_loss(params, part | {"key": keys if axis is None else keys[m : m + 1]})
            for m, part in enumerate(microbatches(data, 4))
        ]
        return sum(losses) / 4

    wanted_value, wanted_grads = jax.value_and_grad(plain)(params)
    assert_close(value, wanted_value, rtol=RTOL)
    assert_close(grads, wanted_grads, rtol=RTOL)


def test_numpy_inputs():
    params, batch = jax.tree.map(np.asarray, (make_params(1), make_batch()))
    check(make_pipelined(), loss_fn, params, batch)


def test_numpy_inputs_may_be_overwritten_after_a_call():
    """A data loader fills the same arrays again. (`jax.jit` itself may still read them, on CPU.)"""

    def loss(params, batch):  # both stages read x, so it has two homes
        x = jnp.tanh(batch["x"] @ params["blocks"][0]["up"])
        return jnp.mean((x @ params["blocks"][0]["down"] - batch["x"]) ** 2)

    params = make_params(1)
    batch = {"x": np.array(normal(5, 4096, WIDTH))}
    wanted = jax.jit(jax.value_and_grad(loss))(params, {"x": batch["x"].copy()})
    pipelined = make_pipelined(loss).compile(params, batch)
    got = pipelined.value_and_grad(params, batch)
    batch["x"][:] = 0
    assert_close(got, wanted, rtol=RTOL)


def test_inputs_survive():
    """Nothing that the caller passes is donated, also where it is in place already."""
    pipelined = make_pipelined()
    params, batch = make_params(1), make_batch()
    first = pipelined.value_and_grad(params, batch)
    placed = jax.tree.map(lambda x, g: jax.device_put(x, g.sharding), params, first[1])
    for _ in range(2):
        again = pipelined.value_and_grad(placed, batch)
        jax.tree.map(np.testing.assert_array_equal, again, first)
    jax.tree.map(np.testing.assert_array_equal, placed, params)


@pytest.mark.usefixtures("lenient")
def test_scalars_take_the_dtype_of_what_they_meet():
    """A Python number, and an array made from one, do not turn bfloat16 into float32."""

    def loss(params, batch):
        x = batch["x"].astype(jnp.bfloat16)
        for kernel in params["kernels"]:
            x = jnp.tanh(x @ kernel.astype(jnp.bfloat16))
        return jnp.mean(x * params["scale"] * batch["scale"])

    params = {"kernels": [matrix(i, 4, 4) for i in range(2)], "scale": jnp.full((), 2.0)}
    batch = {"x": normal(3, 4, 4), "scale": 3.0}
    pipelined = jaxptis.pipeline(
        loss,
        strategy="1f1b",
        num_microbatches=2,
        devices=jax.devices()[:2],
        batch_axes={"x": 0, "scale": None},
    )
    for scale in 2.0, np.float32(2.0):
        got = pipelined.value_and_grad({**params, "scale": scale}, batch)
        want = jax.value_and_grad(loss)({**params, "scale": scale}, batch)
        assert got[0].dtype == want[0].dtype
        assert_close(got[1]["kernels"], want[1]["kernels"], rtol=0.02)


@pytest.mark.parametrize(
    ("strategy", "num_microbatches"),
    [("1f1b", 4), ("zb-v", 4), ("1f1b", 1)],  # of one microbatch each task is the last that reads
)
def test_lowered_stages_are_those_that_run(strategy, num_microbatches, lenient):
    """With the same inputs donated, in a training step, too; nothing is compiled for them."""
    types = jax.eval_shape(lambda: (make_params(), make_batch()))
    pipelined = make_pipelined(strategy=strategy, num_microbatches=num_microbatches)
    lowered = pipelined.lower(*types)
    assert pipelined.num_compilations == 0
    texts = [
        {kind: program.as_text("stablehlo") for kind, program in stage.programs.items()}
        for stage in lowered
    ]
    kinds = {task.kind for row in pipelined.plan.schedule for task in row}
    assert {kind for stage in texts for kind in stage} == kinds
    assert any("tf.aliasing_output" in text for stage in texts for text in stage.values())

    def compiled():
        return [
            {kind: program.as_text("stablehlo") for kind, program in stage.programs.items()}
            for stage in pipelined.stages
        ]

    pipelined.compile(*types)
    assert compiled() == texts
    params, batch = make_params(), make_batch()
    step = pipelined.train_step(optax.sgd(0.1))
    step(step.init(params, batch), batch)
    assert compiled() == texts
