"""What a pipeline cannot do is refused: what is wrong, the numbers, and what to change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxptis
from tests.small_models import loss_fn, make_batch, make_params
from tests.small_pipelines import make_pipelined, refuse

# ---- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe"])
def test_more_stages_than_layers(strategy):
    refuse(
        "^3 layers cannot fill 4 stages.*; pass 3 devices or fewer",
        make_pipelined(num_devices=4, strategy=strategy),
    )


def test_batch_that_microbatches_do_not_divide():
    pipelined = make_pipelined(num_microbatches=3)
    refuse(
        r"batch leaf \['x'\] has shape \(8, 3\): 3 microbatches do not divide its batch of 8; "
        "change the batch or num_microbatches",
        pipelined,
    )
    refuse(r"do not divide its batch of 2", pipelined, batch=make_batch(size=2))
    refuse(r"do not divide its batch of 0", pipelined, batch=make_batch(size=0))


def test_batch_axes_that_do_not_fit():
    refuse(
        r"batch leaf \['x'\] has shape \(8, 3\), so it has no batch axis 2; give its axis in "
        "batch_axes, or None",
        make_pipelined(batch_axes={"x": 2, "y": 0}),
    )
    refuse(r"no batch axis -3", make_pipelined(batch_axes=-3))
    refuse(r"batch_axes \{'x': 0\} is no prefix of the batch", make_pipelined(batch_axes={"x": 0}))
    batch = make_batch() | {"scale": jnp.float32(2)}
    refuse(r"\['scale'\] has shape \(\), so it has no batch axis 0", make_pipelined(), batch=batch)


@pytest.mark.parametrize("number", [0, -1])
def test_microbatches_below_one(number):
    with pytest.raises(ValueError, match=f"num_microbatches is {number}; use 1 or more"):
        make_pipelined(num_microbatches=number)


def test_devices_given_twice():
    first, second = jax.devices()[:2]
    pipelined = jaxptis.pipeline(
        loss_fn, strategy="1f1b", num_microbatches=2, devices=[first, second, first]
    )
    refuse("3 devices are given, 2 of them different; give each device once", pipelined)
    pipelined = jaxptis.pipeline(loss_fn, strategy="1f1b", num_microbatches=2, devices=[])
    refuse("0 devices are given, 0 of them different; .* at least one", pipelined)


# ---- The loss -----------------------------------------------------------------------------------


def test_loss_that_is_not_a_scalar():
    def loss(params, batch):
        return (batch["x"] @ params["first"]).sum(axis=-1)

    refuse(
        r"the loss must be a scalar, but it has shape \(4,\); return its mean",
        make_pipelined(loss),
    )


def test_loss_that_is_not_a_float():
    def loss(params, batch):
        return jnp.argmax(batch["x"] @ params["first"])

    refuse("the loss must be a float, but it has dtype int32", make_pipelined(loss))


def test_pair_without_has_aux():
    def loss(params, batch):
        return loss_fn(params, batch), jnp.float32(0)

    refuse(
        r"the loss must be one scalar, but .* PyTreeDef\(\(\*, \*\)\); return a scalar, or "
        r"\(scalar, aux\) with has_aux=True",
        make_pipelined(loss),
    )


def test_has_aux_without_a_pair():
    refuse(
        r"has_aux=True needs a function that returns \(loss, aux\).* return a pair or drop has_aux",
        make_pipelined(has_aux=True),
    )


def test_integer_output_without_a_batch_axis():
    def loss(params, batch):
        return loss_fn(params, batch), {"size": jnp.int32(len(batch["x"]))}

    refuse(
        r"auxiliary output \['size'\] has dtype int32 and no batch axis.* return a float mean, or "
        "one value a sample",
        make_pipelined(loss, has_aux=True),
    )


def test_output_that_grows_otherwise_than_the_batch():
    def loss(params, batch):
        x = batch["x"] @ params["first"]
        return loss_fn(params, batch), {"products": x @ x.T}

    refuse(
        r"auxiliary output \['products'\] has shape \(4, 4\) for a microbatch and \(8, 8\) for "
        "the batch; one axis must be 2 times as long",
        make_pipelined(loss, has_aux=True),
    )


def test_integer_parameter():
    refuse(
        r"parameter step has dtype int32, which has no gradient; pass it in the batch",
        make_pipelined(),
        params=make_params(1) | {"step": jnp.int32(0)},
    )


def test_loss_without_parameters_or_without_the_batch():
    for loss in (
        lambda params, batch: jnp.mean(batch["x"]),
        lambda params, batch: jnp.mean(params["first"]),
    ):
        refuse(
            "the loss does not depend on both the parameters and the batch", make_pipelined(loss)
        )


def print_it(x):
    jax.debug.print("{}", x.sum())
    return x


def print_in_a_loop(x):
    return jax.lax.scan(lambda x, _: (print_it(x), None), x, length=2)[0]


def call_back(x, ordered):
    io_callback(lambda x: None, None, x, ordered=ordered)
    return x


SIDE_EFFECTS = {
    "jax.debug.print": print_it,
    "jax.debug.print in a scan": print_in_a_loop,
    "jax.debug.print in a jit": jax.jit(print_it),
    "io_callback": functools.partial(call_back, ordered=False),
    "io_callback, ordered": functools.partial(call_back, ordered=True),
}


@pytest.mark.parametrize("effect", SIDE_EFFECTS)
def test_side_effect(effect):
    def loss(params, batch):
        x = SIDE_EFFECTS[effect](batch["x"] @ params["first"])
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    place = re.escape(__file__)
    refuse(
        rf"the loss function has a side effect, \w+ at {place}:\d+.*; .* remove it, or return the "
        "value with has_aux=True",
        make_pipelined(loss),
    )


def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("data",))


def constrain(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), PartitionSpec("data")))


def shard(x):
    spec = PartitionSpec("data")
    return jax.shard_map(jnp.tanh, mesh=mesh(), in_specs=spec, out_specs=spec)(x)


def put(x):
    return jax.device_put(x, jax.devices()[1])


@pytest.mark.parametrize(
    ("bind", "name"),
    [(constrain, "sharding_constraint"), (shard, "shard_map"), (put, "device_put")],
)
def test_primitive_bound_to_devices(bind, name):
    def loss(params, batch):
        x = jax.jit(bind)(batch["x"] @ params["first"])
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    place = re.escape(__file__)
    refuse(
        f"^{name} at {place}:.* cannot be cut into stages; remove it, jaxptis places every value",
        make_pipelined(loss),
    )


def test_loop_without_a_reverse():
    def loss(params, batch):
        x = batch["x"] @ params["first"]
        x = jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x + 1, x)
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    with pytest.raises(ValueError, match=rf"while at {re.escape(__file__)}:.*use jax\.lax\.scan"):
        make_pipelined(loss).value_and_grad(make_params(1), make_batch())


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe"])
def test_nan_is_not_hidden(strategy):
    """NaN in one sample of the last microbatch is NaN in the loss and in all gradients."""
    batch = make_batch()
    batch["x"] = batch["x"].at[-1, 0].set(jnp.nan)
    value, grads = make_pipelined(strategy=strategy).value_and_grad(make_params(1), batch)
    assert np.isnan(value)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(grads))
    assert np.isnan(make_pipelined(strategy=strategy).evaluate(make_params(1), batch))


def test_nan_trains_on(lenient):
    batch = make_batch()
    batch["x"] = batch["x"].at[-1, 0].set(jnp.nan)
    step = make_pipelined().train_step(optax.adamw(1e-2))
    state, metrics = step(step.init(make_params(1), batch), batch)
    assert np.isnan(metrics["loss"])
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(state.params))
