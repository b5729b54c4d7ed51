"""A pipeline whose head is in slices gives what the plain step gives."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import jaxptis
from models import next_token_loss
from models.llama2 import SIZES, Llama2
from tests import foreign_models
from tests.small_models import assert_close

HEAD_SLICES = 4
# The same sums in another order, over slices and microbatches.
RTOL = 1e-5

CONFIG = dataclasses.replace(
    SIZES["tiny"],
    vocab_size=502,  # not a multiple of the slices
    model_width=16,
    mlp_width=16,
    num_blocks=1,
    num_heads=2,
    num_kv_heads=1,
)


@functools.cache
def llama2():
    model = Llama2(CONFIG)
    batch = {"tokens": jax.random.randint(jax.random.key(0), (4, 9), 0, CONFIG.vocab_size)}
    params = jax.jit(model.init)(jax.random.key(1), batch["tokens"])

    def loss(params, batch):
        return next_token_loss(functools.partial(model.apply, params), batch)

    return loss, params, batch


@functools.cache
def gpt2():
    """Its head is its embedding."""
    model = foreign_models.MODELS["gpt2"]()
    params, batch = model.draw(seed=1)
    return model.loss, params, batch


@functools.cache
def plain(make):
    loss, params, batch = make()
    return jax.jit(jax.value_and_grad(loss))(params, batch)


def make_pipelined(loss, num_devices=2, **options):
    return jaxptis.pipeline(
        loss,
        num_microbatches=2,
        devices=jax.devices()[:num_devices],
        **{"strategy": "1f1b", **options},
    )


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize(("make", "name"), [(llama2, "params/head"), (gpt2, "transformer/wte")])
def test_loss_and_gradients_are_those_of_the_plain_step(make, name, num_devices):
    loss, params, batch = make()
    pipelined = make_pipelined(loss, num_devices, head_slices=HEAD_SLICES)
    got_loss, got = pipelined.value_and_grad(params, batch)
    wanted_loss, wanted = plain(make)
    assert_close(got_loss, wanted_loss, rtol=RTOL)
    assert_close(got, wanted, rtol=RTOL)
    heads = [[x for x in s.layers if x.startswith(name)] for s in pipelined.plan.stages]
    # What is in front of it is called so, too, where it is tied.
    assert sum(map(len, heads)) >= HEAD_SLICES
    # Llama's is more than half of the model, so that no stage can have all of it.
    assert sum(map(bool, heads)) >= (2 if make is llama2 else 1)


@pytest.mark.parametrize("head_slices", [0, -3])
def test_less_than_one_slice(head_slices):
    with pytest.raises(ValueError, match=f"head_slices is {head_slices}; use 1"):
        make_pipelined(llama2()[0], head_slices=head_slices)


def test_more_slices_than_the_vocabulary_has_entries():
    loss, params, batch = llama2()
    pipelined = make_pipelined(loss, head_slices=CONFIG.vocab_size + 1)
    with pytest.raises(ValueError, match=r"head_slices is 503, .* lower head_slices to 502"):
        pipelined.value_and_grad(params, batch)


def test_a_model_without_a_head():
    pipelined = make_pipelined(lambda w, x: ((x @ w) ** 2).mean(), head_slices=2)
    with pytest.raises(ValueError, match=r"needs a matmul .* set head_slices to 1"):
        pipelined.value_and_grad(np.ones((3, 2), np.float32), np.ones((4, 3), np.float32))


def test_best_chooses_the_number_of_slices():
    """A head of nearly all the work is cut, and the step stays the plain one."""
    loss, params, batch = llama2()
    names = {}
    for choices in (1, (1, 4)):
        pipelined = make_pipelined(loss, 4, head_slices=choices, strategy="best")
        value, grads = pipelined.value_and_grad(params, batch)
        step_s = pipelined.timeline.step_s
        assert_close((value, grads), plain(llama2), rtol=RTOL)
        names[choices] = len(pipelined.plan.layers), step_s
    assert names[1, 4][0] == names[1][0] + 3
    assert names[1, 4][1] < names[1][1]


@pytest.mark.parametrize("choices", [(), (2, 0)])
def test_no_slices_are_refused(choices):
    with pytest.raises(ValueError, match="use 1 to leave the head whole"):
        make_pipelined(lambda w, x: x, head_slices=choices)
