import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from passes import jaxprs
from passes.layers import find_layers
from passes.origins import BOTH, Origin, find_origins
from tests.passes.language_models import (
    HIDDEN,
    VOCAB,
    WIDTH,
    block_params,
    cross_entropy,
    language_model,
    names,
    params,
)
from tests.passes.on_host import layers_of, program_of
from tests.passes.small_models import MODELS, array, case, mlp, norm, tokens


def primitives(graph):
    eqns = [graph.program.jaxpr.eqns[i].primitive.name for i in graph.activations]
    return [eqns[layer.start : layer.stop] for layer in graph.layers]


def residual_loss(p, ids):
    x = p["embedding"][ids]
    for block in p["blocks"]:
        x = x + mlp(block, x)
    return cross_entropy(x @ p["head"], ids)


def test_residual_blocks():
    graph = layers_of(residual_loss, language_model(), tokens())
    assert names(graph) == ["embedding", "blocks/0", "blocks/1", "blocks/2", "head"]
    for layer, read in zip(graph.layers[1:-1], params(graph)[1:-1], strict=True):
        assert read == {f"{layer.name}/{key}" for key in ("scale", "up", "bias", "down")}
    assert {len(p) for p in primitives(graph)[1:-1]} == {len(primitives(graph)[1])}


@pytest.mark.parametrize("widths", [(9, 8, 7, 6, 5), (5, 5, 5, 5), (4, 6, 5, 7)])
def test_a_chain_keeps_bias_and_activation_with_their_matmul(widths):
    shapes = list(itertools.pairwise(widths))
    p = {f"layer{i}": {"bias": array(b), "kernel": array(a, b)} for i, (a, b) in enumerate(shapes)}

    def loss(p, x):
        for layer in p.values():
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return (x**2).mean()

    graph = layers_of(loss, p, array(2, widths[0]))
    assert names(graph) == list(p)
    for layer in primitives(graph)[:-1]:
        assert layer == ["dot_general", "add", "custom_jvp_call"]
    assert primitives(graph)[-1][:3] == ["dot_general", "add", "custom_jvp_call"]
    assert params(graph) == [{f"{name}/bias", f"{name}/kernel"} for name in p]


def test_a_norm_goes_with_the_matmul_behind_it():
    def loss(p, ids):
        x = p["embedding"][ids]
        for block in p["blocks"]:
            x = norm(x + jnp.tanh(x @ block["up"] + block["bias"]) @ block["down"], block["scale"])
        return cross_entropy(x @ p["head"], ids)

    graph = layers_of(loss, language_model(2), tokens())
    assert params(graph) == [
        {"embedding"},
        {"blocks/0/up", "blocks/0/bias", "blocks/0/down"},
        {"blocks/0/scale", "blocks/1/up", "blocks/1/bias", "blocks/1/down"},
        {"blocks/1/scale", "head"},
    ]


def test_attention_and_mlp_are_layers_of_their_own():
    graph = case("llama2").graph
    blocks = [f"layers_{i}/{part}" for i in range(2) for part in ("attention", "mlp")]
    assert names(graph) == ["embed", *blocks, "head"]
    for layer, read in zip(graph.layers[1:-1], params(graph)[1:-1], strict=True):
        assert read == {p for p in graph.program.params if p.startswith(f"{layer.name}/")}
    assert params(graph)[-1] == {"norm/scale", "head/kernel"}


def test_layers_that_read_the_same_parameter_have_different_names():
    def loss(p, ids):
        x = p["embedding"][ids]
        for _ in range(2):
            x = x + mlp(p["block"], x)
        return cross_entropy(x @ p["embedding"].T, ids)

    graph = layers_of(loss, {"embedding": array(VOCAB, WIDTH), "block": block_params(0)}, tokens())
    assert names(graph) == ["embedding", "block", "block#2", "embedding#2"]


def test_a_layer_of_several_modules_is_named_after_the_first_and_the_last():
    def loss(p, x):
        halves = x @ p["Dense_9"]["kernel"], x @ p["Dense_10"]["kernel"]
        return jnp.concatenate(halves, axis=-1).sum()

    p = {f"Dense_{i}": {"kernel": array(4, 4, seed=i)} for i in (9, 10)}
    assert names(layers_of(loss, p, array(2, 4))) == ["Dense_9..Dense_10"]


def test_names_that_look_numbered_do_not_clash():
    def loss(p, x):
        for name in ("a", "a", "a#2"):
            x = jnp.tanh(x @ p[name])
        return x.sum()

    graph = layers_of(loss, {"a": array(4, 4), "a#2": array(4, 4)}, array(2, 4))
    assert len(set(names(graph))) == 3


def test_a_model_under_one_jit_has_the_same_layers():
    p, ids = language_model(), tokens()
    plain = layers_of(residual_loss, p, ids)
    jitted = layers_of(jax.jit(residual_loss), p, ids)
    assert jitted.text() == plain.text()
    assert primitives(jitted) == primitives(plain)


def test_an_nnx_model():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.gelu(self.up(self.norm(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))

    def loss(state, ids):
        return cross_entropy(nnx.merge(graphdef, state)(ids), ids)

    graph = layers_of(loss, state, tokens())
    assert names(graph) == ["embed/embedding", "blocks/0", "blocks/1", "head"]


def test_a_scan_over_blocks_is_a_layer_for_each():
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(block_params(10 * i) for i in range(3)))

    def loss(p, ids):
        x = p["embedding"][ids]
        x, _ = jax.lax.scan(lambda x, block: (x + mlp(block, x), None), x, p["blocks"])
        return cross_entropy(x @ p["head"], ids)

    graph = layers_of(loss, {**language_model(), "blocks": stacked}, tokens())
    blocks = [f"blocks[{k}]" for k in range(3)]
    assert names(graph) == ["embedding", *blocks, "head"]


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, x: (x @ p["dense"]["kernel"]).sum(),
        lambda p, x: (x * p["dense"]["bias"]).sum(),  # light: no layer by itself
        lambda p, x: jnp.sin(x.sum() + p["dense"]["bias"].sum()),
    ],
)
def test_a_single_layer(loss_fn):
    graph = layers_of(loss_fn, {"dense": {"kernel": array(4, 4), "bias": array(4)}}, array(2, 4))
    assert names(graph) == ["dense"]
    assert graph.layers[0].stop == len(graph.activations)


@pytest.mark.parametrize(
    "loss_fn", [lambda p, x: x.sum(), lambda p, x: p.sum(), lambda p, x: jnp.float32(1)]
)
def test_a_loss_without_activations_is_refused(loss_fn):
    program = program_of(loss_fn, array(4), array(4))
    with pytest.raises(ValueError, match="does not depend on both the parameters and the batch"):
        find_layers(program)


def test_weights_in_the_order_of_a_constant():
    order = np.array([2, 0, 3, 1])

    def loss(p, x):
        for k in range(3):
            x = x + jnp.tanh(x @ p["w"][k][order])
        return x.sum()

    graph = layers_of(loss, {"w": array(3, 4, 4)}, array(2, 4))
    assert names(graph) == ["w[0]", "w[1]", "w[2]"]


def test_origins():
    ones = np.ones(4, np.float32)

    def loss(p, batch):
        weight, mask, table = jnp.tanh(p * ones), batch > ones, jnp.arange(4.0) + ones
        bias = jnp.where(mask, weight, 0)  # light: no activation
        return jnp.sum(bias * jnp.sin(table)), (weight, mask, table, bias)

    program = program_of(loss, array(4), array(4), has_aux=True)
    origins = find_origins(program)
    expected = [BOTH | Origin.ACTIVATION, Origin.PARAMS, Origin.BATCH, Origin.NOTHING, BOTH]
    assert [origins[v] for v in program.jaxpr.outvars] == expected


@pytest.mark.parametrize("name", MODELS)
def test_layers_cover_the_activations(name):
    graph = case(name).graph
    assert len(graph.layers) >= 4
    assert graph.layers[0].start == 0
    for layer, following in itertools.pairwise(graph.layers):
        assert layer.start < layer.stop == following.start
    assert graph.layers[-1].stop == len(graph.activations)
    read = {v for v in graph.program.param_vars if v in jaxprs.read_vars(graph.program.jaxpr)}
    held = {p for layer in graph.layers for p in layer.params}
    assert held == {p for p, v in enumerate(graph.program.param_vars) if v in read}
    assert len(graph.text().splitlines()) == len(graph.layers)


def test_lookups_in_a_row_are_one_layer():
    def loss(p, ids):
        x = p["tokens"][ids] + p["positions"][jnp.cumsum(ids, axis=-1)] + p["types"][ids % 2]
        for block in p["blocks"]:
            x = x + mlp(block, x)
        return cross_entropy(x @ p["head"], ids)

    tables = {
        "tokens": array(VOCAB, WIDTH),
        "positions": array(64, WIDTH),
        "types": array(2, WIDTH),
    }
    graph = layers_of(loss, {**language_model(1), **tables}, tokens())
    assert params(graph)[0] == set(tables)
    assert names(graph)[1:] == ["blocks/0", "head"]
