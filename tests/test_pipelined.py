"""What a pipeline returns is what the plain function returns, in every form it takes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_models import WIDTH, assert_close, block, loss_fn, make_batch, make_params, normal
from tests.small_pipelines import RTOL, check, make_pipelined, plan_of


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe"])
def test_gradients(strategy):
    pipelined = make_pipelined(num_devices=4, num_microbatches=4, strategy=strategy)
    grads = check(pipelined, loss_fn, make_params(), make_batch())
    for stage in pipelined.plan.stages:
        for layer in stage.layers:
            name, *index = layer.split("/")
            part = grads[name][int(index[0])] if index else grads[name]
            for leaf in jax.tree.leaves(part):
                assert leaf.devices() == {jax.devices()[stage.device]}
    assert pipelined.evaluate(make_params(), make_batch()).devices() == {jax.devices()[3]}


def test_one_device():
    check(make_pipelined(num_devices=1), loss_fn, make_params(1), make_batch())


def test_one_microbatch():
    check(make_pipelined(num_microbatches=1), loss_fn, make_params(1), make_batch())


def test_skip_connection_to_the_last_layer(tmp_path):
    def loss(params, batch):
        x = first = batch["x"] @ params["first"]
        for p in params["blocks"]:
            x = block(p, x)
        return jnp.mean(((x + first) @ params["head"] - batch["y"]) ** 2)

    pipelined = make_pipelined(loss, num_devices=4, dump_to=str(tmp_path))
    check(pipelined, loss, make_params(4), make_batch())
    assert all(f"stage {s} -> {s + 1}\n" in stages_text(tmp_path) for s in range(3))
    assert not re.search(r"-> .*,", stages_text(tmp_path))


def test_value_read_by_two_later_stages(tmp_path):
    """The first layer makes a gate for the hidden values of the last two blocks."""

    def loss(params, batch):
        x = batch["x"] @ params["first"]
        gate = jnp.tanh(x[:, :1])
        for i, p in enumerate(params["blocks"]):
            hidden = jnp.tanh(x @ p["up"])
            x = x + (hidden * gate if i >= 2 else hidden) @ p["down"]
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    layers = (("first", "blocks/0"), ("blocks/1",), ("blocks/2",), ("blocks/3", "head"))
    plan = plan_of(layers, devices=(0, 1, 2, 3), num_microbatches=2)
    pipelined = make_pipelined(loss, num_devices=4, strategy=plan, dump_to=str(tmp_path))
    check(pipelined, loss, make_params(4), make_batch())
    sent = re.findall(r"stage \d -> .*", stages_text(tmp_path))
    assert sorted(sent) == [f"stage {s} -> {s + 1}" for s in range(3) for _ in range(2)]


def stages_text(folder):
    (path,) = folder.glob("*.stages.txt")
    return path.read_text()


def test_auxiliary_loss_of_a_middle_layer():
    def loss(params, batch):
        x, extra = batch["x"] @ params["first"], jnp.float32(0)
        for i, p in enumerate(params["blocks"]):
            x = block(p, x)
            if i == 1:
                extra = jnp.mean(jnp.abs(x))
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2) + 0.1 * extra

    check(make_pipelined(loss, num_devices=4), loss, make_params(4), make_batch())


def test_integers_cross_without_a_gradient():
    """The last stage reads where the first layer's values are largest."""

    def loss(params, batch):
        x = batch["x"] @ params["first"]
        largest = jnp.argmax(x, axis=-1)
        for p in params["blocks"]:
            x = block(p, x)
        chosen = jnp.take_along_axis(x, largest[:, None], axis=-1)
        return jnp.mean((x @ params["head"] - batch["y"] + chosen) ** 2)

    check(make_pipelined(loss, num_devices=4), loss, make_params(4), make_batch())


def test_closed_over_arrays():
    offset, mask = normal(9, WIDTH), np.arange(WIDTH) % 2 == 0

    def loss(params, batch):
        x = batch["x"] @ params["first"]
        for p in params["blocks"]:
            x = block(p, jnp.where(mask, x, offset))
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    check(make_pipelined(loss), loss, make_params(2), make_batch())


def test_evaluation_alone():
    pipelined = make_pipelined(num_devices=4)
    value = pipelined.evaluate(make_params(), make_batch())
    assert_close(value, loss_fn(make_params(), make_batch()), rtol=RTOL)
    # Four forward programs, two transfers' programs, and what joins the results.
    forward_only = pipelined.num_compilations
    pipelined.value_and_grad(make_params(), make_batch())
    assert pipelined.num_compilations >= forward_only + 8


def loss_with_aux(params, batch):
    x = batch["x"] @ params["first"]
    for i, p in enumerate(params["blocks"]):
        x = block(p, x)
        if i == 0:
            middle = x
    out = x @ params["head"]
    errors = jnp.sum((out - batch["y"]) ** 2, axis=-1)
    aux = {
        "error": jnp.mean(jnp.sqrt(errors)),
        "error_of_sample": errors,
        "label_of_sample": jnp.argmax(out, axis=-1),
        "samples_last": out.T,
        "middle": (middle, jnp.mean(middle, axis=0)),
        "inputs": batch["x"],
    }
    return jnp.mean(errors), aux


def test_auxiliary_outputs():
    pipelined = make_pipelined(loss_with_aux, num_devices=4, num_microbatches=4, has_aux=True)
    params, batch = make_params(4), make_batch()
    (value, aux), grads = pipelined.value_and_grad(params, batch)
    wanted = jax.jit(jax.value_and_grad(loss_with_aux, has_aux=True))(params, batch)
    assert_close(((value, aux), grads), wanted, rtol=RTOL)
    np.testing.assert_array_equal(aux["label_of_sample"], wanted[0][1]["label_of_sample"])
    assert_close(pipelined.evaluate(params, batch), wanted[0], rtol=RTOL)


def test_auxiliary_outputs_of_one_microbatch():
    def loss(params, batch):
        return loss_fn(params, batch), {"size": jnp.int32(len(batch["x"]))}

    pipelined = make_pipelined(loss, num_devices=1, num_microbatches=1, has_aux=True)
    got = pipelined.evaluate(make_params(1), make_batch())
    assert_close(got, loss(make_params(1), make_batch()), rtol=RTOL)


def test_empty_auxiliary_output():
    def loss(params, batch):
        return loss_fn(params, batch), None

    pipelined = make_pipelined(loss, num_devices=1, has_aux=True)
    value, aux = pipelined.evaluate(make_params(1), make_batch())
    assert aux is None
    assert_close(value, loss_fn(make_params(1), make_batch()), rtol=RTOL)
