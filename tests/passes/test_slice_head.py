"""A head in slices: what the loss gives, what its stages save, and what is left alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import next_token_loss
from models.llama2 import Llama2
from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.layers import find_layers
from passes.slice_head import slice_head
from passes.stages import Role
from tests.passes.head_losses import (
    BATCH,
    IDS,
    LENGTH,
    LOSSES,
    PARAMS,
    VOCAB,
    WIDTH,
    half,
    hidden,
    logits_of,
    logsumexp_minus_logit_tied_and_capped,
    optax_integer_labels,
    pick,
    smoothed_in_half,
)
from tests.passes.on_host import count_layers, layers_of, program_of, run_gradient
from tests.passes.small_models import MODELS, TINY, array
from tests.small_models import assert_close

COUNT = 4  # which does not divide the vocabulary
TOKEN_BYTES = 4 * BATCH * LENGTH  # of a float32 a token
# Equal float32 sums in another order.
RTOL = 1e-5


@functools.cache
def program(fun, count=1):
    if count > 1:
        return slice_head(dataclasses.replace(program(fun), head_slices=count))
    with jax.numpy_dtype_promotion("standard"):  # what optax needs
        return program_of(fun, PARAMS, IDS)


@functools.cache
def value_and_grad(fun, count=1):
    """Return the compiled loss and gradient of parameters and tokens."""
    return jax.jit(jax.value_and_grad(loss_of(program(fun, count))))


def loss_of(program):
    def loss(params, ids):
        args = [*program.constants, *jax.tree.leaves(params), ids]
        return jaxprs.evaluate(program.jaxpr, args)[0]

    return loss


def check(fun, params, *, rtol=RTOL):
    """Compare loss and gradients of slices with those of the whole; returns the loss."""
    wanted_loss, wanted = value_and_grad(fun)(params, IDS)
    got_loss, got = value_and_grad(fun, COUNT)(params, IDS)
    assert_close(got_loss, wanted_loss, rtol=RTOL)
    assert_close(got, wanted, rtol=rtol)
    return wanted_loss


def saved_bytes(program):
    """Return the bytes that each layer, as a stage, saves beside what crosses anyway."""
    graph = find_layers(program)
    gradients = differentiate(cut_stages(graph, range(len(graph.layers) + 1)))
    return [jaxprs.nbytes(gradient.forward.avals_of(Role.SAVED)) for gradient in gradients]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_whole(name):
    check(LOSSES[name], PARAMS)


@pytest.mark.parametrize("name", LOSSES)
def test_each_slice_is_a_layer_and_differentiated_alone(name):
    graph = find_layers(program(LOSSES[name], COUNT))
    assert len(graph.layers) == 1 + COUNT
    assert len({layer.name for layer in graph.layers}) == 1 + COUNT
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    results, sums = run_gradient(stages, differentiate(stages), PARAMS, IDS)
    wanted_loss, wanted = value_and_grad(LOSSES[name])(PARAMS, IDS)
    assert_close(results[0], wanted_loss, rtol=RTOL)
    assert_close(sums, jax.tree.leaves(wanted), rtol=RTOL)
    # The hidden states, the maximum, and a sum or two a reduction: nothing as wide as a slice.
    for stage in stages.stages[2:]:
        inputs = [stages.crossings[c].aval for c in stage.inputs]
        assert jaxprs.nbytes(inputs) <= (WIDTH + 4) * TOKEN_BYTES


@pytest.mark.parametrize("place", [0, 15, 30, 49])
def test_the_largest_logit_may_be_in_any_slice(place):
    raised = PARAMS["head"]["bias"].at[place].add(30.0)
    check(optax_integer_labels, {**PARAMS, "head": {**PARAMS["head"], "bias": raised}})


@pytest.mark.parametrize("sign", [-1, 1])
def test_large_logits_do_not_overflow(sign):
    # Rising, so that each slice rescales the sum of those before it; or falling.
    bias = sign * jnp.linspace(0, 1e4, VOCAB)
    loss = check(optax_integer_labels, {**PARAMS, "head": {**PARAMS["head"], "bias": bias}})
    assert np.isfinite(loss) and loss > 1e3


@pytest.mark.parametrize("target", [-1, -VOCAB - 1, VOCAB, VOCAB + 20])
@pytest.mark.parametrize(
    ("name", "has_gradient"),
    [
        ("optax_integer_labels", True),  # the gather from the logits gives nan
        ("log_softmax_then_shift", True),  # likewise, from the log-probabilities
        ("vmapped", True),  # it clips
        ("flat_and_indexed", False),  # it promises what is not so
    ],
)
def test_targets_outside_of_the_vocabulary(name, has_gradient, target):
    ids = IDS.at[0, 1].set(target)
    wanted_loss, wanted = value_and_grad(LOSSES[name])(PARAMS, ids)
    got_loss, got = value_and_grad(LOSSES[name], COUNT)(PARAMS, ids)
    np.testing.assert_allclose(got_loss, wanted_loss, rtol=RTOL, equal_nan=True)
    if has_gradient:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=RTOL, atol=1e-6, equal_nan=True)


def test_bfloat16_logits():
    # Gradients of the hidden states are sums of COUNT bfloat16s, each of 8 bits.
    check(half, PARAMS, rtol=COUNT * 2**-8)


def test_sums_of_large_bfloat16_logits():
    logits = (logits_of(PARAMS, IDS) + 1000.0).astype(jnp.bfloat16).astype(jnp.float32)
    labels = 0.9 * jax.nn.one_hot(IDS, VOCAB) + 0.1 / VOCAB
    wanted = -(labels * jax.nn.log_softmax(logits)).sum(-1).mean()
    # Not compiled: XLA would keep more digits than the types have.
    got = loss_of(program(smoothed_in_half, COUNT))(PARAMS, IDS)
    # The log of each token's sum, which is less than 16, is rounded to 8 bits.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2**-5)


def test_many_terms_beside_the_head():
    """More of them than Python allows calls inside of each other."""
    params = {**PARAMS, "biases": [array(3, seed=i) for i in range(300)]}

    def loss(p, ids):
        return optax_integer_labels(p, ids) + 1e-3 * sum(jnp.sum(b * b) for b in p["biases"])

    with jax.numpy_dtype_promotion("standard"):  # what optax needs
        whole = program_of(loss, params, IDS)
    parts = slice_head(dataclasses.replace(whole, head_slices=COUNT))
    wanted, got = (jax.jit(loss_of(each))(params, IDS) for each in (whole, parts))
    assert_close(got, wanted, rtol=RTOL)


@pytest.mark.parametrize("name", LOSSES)
def test_no_more_is_saved_than_by_the_whole(name):
    whole, parts = (sum(saved_bytes(program(LOSSES[name], k))) for k in (1, COUNT))
    # Beside its part of the logits, a slice saves some numbers a token: no more than four.
    assert parts <= whole + 4 * COUNT * TOKEN_BYTES


def test_a_capped_head_saves_less():
    """The whole saves the tanh and the exponential, a slice the tanh only."""
    capped = logsumexp_minus_logit_tied_and_capped
    whole, parts = (sum(saved_bytes(program(capped, k))) for k in (1, COUNT))
    assert whole >= 2 * VOCAB * TOKEN_BYTES
    assert parts <= 0.75 * whole  # half, and a few numbers a token


def test_half_as_much_is_saved_of_bfloat16_logits():
    hidden, *parts = saved_bytes(program(half, COUNT))
    assert VOCAB // 2 * TOKEN_BYTES <= sum(parts) <= (VOCAB // 2 + 4 * COUNT) * TOKEN_BYTES
    assert sum(saved_bytes(program(half))) >= hidden + VOCAB * TOKEN_BYTES


@pytest.mark.parametrize("name", ["by_hand", "logsumexp_minus_logit_tied_and_capped"])
def test_a_kernel_is_read_by_static_slices_only(name):
    after = program(LOSSES[name], COUNT)
    path = "head/kernel" if name == "by_hand" else "embedding"
    kernel = after.param_vars[after.params.index(path)]
    readers = [e for e in after.jaxpr.eqns if kernel in jaxprs.reads(e)]
    slices = [e for e in readers if e.primitive.name == "slice"]
    # A tied embedding is looked up, too.
    others = [e.primitive.name for e in readers if e not in slices]
    assert others == ([] if name == "by_hand" else ["gather"])
    axis = 1 if name == "by_hand" else 0
    spans = sorted(
        (e.params["start_indices"][axis], e.params["limit_indices"][axis]) for e in slices
    )
    assert spans == [(0, 12), (12, 25), (25, 37), (37, 50)]


def test_one_slice_is_the_program_itself():
    whole = program(optax_integer_labels)
    assert slice_head(whole) is whole


def returned(p, ids):
    logits = logits_of(p, ids)
    return -pick(jax.nn.log_softmax(logits), ids).mean(), logits


def accuracy(p, ids):
    logits = logits_of(p, ids)
    return -pick(jax.nn.log_softmax(logits), ids).mean(), (logits.argmax(-1) == ids).mean()


def squares(p, ids):
    return (logits_of(p, ids) ** 2).mean(), ()


def differentiated_maximum(p, ids):
    logits = logits_of(p, ids)
    return (jax.nn.logsumexp(logits, axis=-1) + logits.max(-1)).mean(), ()


def rounded_log_probs(dtype, p, ids):
    log_probs = jax.nn.log_softmax(logits_of(p, ids)).astype(dtype)
    return -pick(log_probs, ids).astype(jnp.float32).mean(), ()


def rounded_exponentials(p, ids):
    exponentials = jnp.exp(logits_of(p, ids)).astype(jnp.int32)
    return jnp.log(exponentials.sum(-1).astype(jnp.float32)).mean(), ()


def no_matmul(p, ids):
    return hidden(p, ids).mean(), ()


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (returned, "the loss function returns it"),
        (accuracy, "argmax at .*test_slice_head.py"),
        (squares, "no sum of its exponentials"),
        (differentiated_maximum, "reduce_max at .*test_slice_head.py.* is differentiated"),
        *(
            (functools.partial(rounded_log_probs, dtype), f"_type at .* rounds float32 to {dtype}")
            for dtype in ("bfloat16", "float16", "int32")
        ),
        (rounded_exponentials, "rounds float32 to int32"),
        (no_matmul, "there is no matmul by a parameter"),
    ],
)
def test_what_is_no_head_is_left_alone_or_refused(fun, message):
    whole = program_of(fun, PARAMS, IDS, has_aux=True)
    assert slice_head(whole) is whole
    with pytest.raises(ValueError, match=f"head_slices is 2.*{message}.*set head_slices to 1"):
        slice_head(dataclasses.replace(whole, head_slices=2))


def test_more_slices_than_the_vocabulary_has_entries():
    with pytest.raises(ValueError, match=r"head_slices is 51, .* 50; lower head_slices to 50"):
        program(optax_integer_labels, VOCAB + 1)


def test_heavy_equations_that_share_what_they_read_are_layers():
    """Three small readouts of one stream; beside it little is carried from one to the next."""
    p = {
        "embedding": array(16, 32),
        **{k: array(32, 1, seed=i) for i, k in enumerate("abc")},
    }

    def loss(p, ids):
        x = jnp.sin(p["embedding"][ids])
        return sum(jnp.tanh(x @ p[k]) for k in "abc").mean()

    graph = layers_of(loss, p, IDS % 16)
    assert [layer.name for layer in graph.layers] == ["embedding", "a", "b", "c"]


def test_a_loss_that_slices_its_head_itself():
    _, params, batch = MODELS["llama2"]()

    def loss(p, batch):
        model = functools.partial(Llama2(TINY).apply, {"params": p})
        return next_token_loss(model, batch, head_slices=COUNT)

    names = [layer.name for layer in layers_of(loss, params, batch).layers]
    # The last norm goes with the first slice.
    slices = ["head..norm", "head[:,8:16]", "head[:,16:24]", "head[:,24:32]"]
    assert [name for name in names if "head" in name] == slices
    assert len(names) == 1 + 2 * TINY.num_blocks + COUNT


def test_a_vocabulary_of_262144_in_four_equal_layers():
    width, vocab = 8, 262_144
    p = {"embedding": array(16, width), "head": array(width, vocab)}
    ids = jnp.arange(4, dtype=jnp.int32)[None]

    def loss(p, ids):
        log_probs = jax.nn.log_softmax(p["embedding"][ids] @ p["head"])
        return -pick(log_probs, ids * 80_000).mean()

    whole = program_of(loss, p, ids)
    parts = slice_head(dataclasses.replace(whole, head_slices=4))
    wanted, got = (jax.jit(jax.value_and_grad(loss_of(each)))(p, ids) for each in (whole, parts))
    assert_close(got[0], wanted[0], rtol=RTOL)
    assert_close(got[1], wanted[1], rtol=RTOL)
    work = count_layers(find_layers(parts))[1:]
    assert len(work) == 4
    for flops in [w.forward.flops for w in work], [w.backward.flops for w in work]:
        assert min(flops) > 2 * 4 * width * vocab / 4  # the matmul of a slice at least
        assert max(flops) <= 1.1 * min(flops)
