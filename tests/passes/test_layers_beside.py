"""Layers of models that are no chain: what passes by a block, and what is beside it."""

import jax
import jax.numpy as jnp
import pytest

from tests.passes.language_models import (
    VOCAB,
    WIDTH,
    block_params,
    cross_entropy,
    language_model,
    names,
    params,
)
from tests.passes.on_host import layers_of
from tests.passes.small_models import array, mlp, norm, tokens


def test_the_matmuls_of_experts_belong_together():
    """Narrow between them, as the experts' rows are wider than their hidden values."""
    num_experts, num_chosen = 8, 6

    def experts(block, x):
        chosen = jax.lax.top_k(x @ block["router"], num_chosen)[1].reshape(-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=num_experts)
        hidden = jax.nn.relu(jax.lax.ragged_dot(x[order // num_chosen], block["up"], sizes))
        rows = jax.lax.ragged_dot(hidden, block["down"], sizes)
        return rows[jnp.argsort(order)].reshape(-1, num_chosen, WIDTH).sum(axis=1)

    def loss(p, ids):
        x = p["embedding"][ids].reshape(-1, WIDTH)
        for block in p["blocks"]:
            x = x + experts(block, x)
        return cross_entropy(x @ p["head"], ids.reshape(-1))

    blocks = [
        {
            "router": array(WIDTH, num_experts),
            "up": array(num_experts, WIDTH, WIDTH // 4),
            "down": array(num_experts, WIDTH // 4, WIDTH),
        }
        for _ in range(2)
    ]
    graph = layers_of(loss, {**language_model(), "blocks": blocks}, tokens())
    assert names(graph) == ["embedding", "blocks/0", "blocks/1", "head"]


def test_an_auxiliary_loss_is_carried_along():
    def loss(p, ids):
        x, extra = p["embedding"][ids], jnp.float32(0)
        for block in p["blocks"]:
            y = mlp(block, x)
            extra = extra + jnp.mean(y**2)
            x = x + y
        return cross_entropy(x @ p["head"], ids) + extra

    p = {**language_model(), "head": array(WIDTH, 4 * VOCAB)}
    graph = layers_of(loss, p, tokens())
    assert names(graph) == ["embedding", "blocks/0", "blocks/1", "blocks/2", "head"]


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 4), (1, 3), (0, 2)])
def test_a_skip_over_several_blocks(start, stop):
    def loss(p, ids):
        x = skip = p["embedding"][ids]
        for i, block in enumerate(p["blocks"]):
            skip = x if i <= start else skip
            x = x + mlp(block, x)
            x = x + skip if i == stop - 1 else x
        return cross_entropy(x @ p["head"], ids)

    graph = layers_of(loss, language_model(4), tokens())
    assert names(graph) == ["embedding", *(f"blocks/{i}" for i in range(4)), "head"]


def attention(p, x, memory=None):
    memory = x if memory is None else memory
    q, k, v = x @ p["q"], memory @ p["k"], memory @ p["v"]
    return jax.nn.softmax(q @ k.mT) @ v @ p["o"]


def attention_params(seed):
    return {name: array(WIDTH, WIDTH, seed=seed + i) for i, name in enumerate("qkvo")}


def test_the_output_of_an_encoder_passes_by_the_decoder():
    p = {
        **language_model(0),
        "encoder": [block_params(i) for i in range(2)],
        "decoder": [
            {
                "self": attention_params(i),
                "cross": attention_params(10 + i),
                "mlp": block_params(20 + i),
            }
            for i in range(3)
        ],
    }

    def loss(p, ids):
        memory = p["embedding"][ids]
        for layer in p["encoder"]:
            memory = memory + mlp(layer, memory)
        x = p["embedding"][ids + 1]
        for layer in p["decoder"]:
            x = x + attention(layer["self"], x)
            x = x + attention(layer["cross"], x, memory)
            x = x + mlp(layer["mlp"], x)
        return cross_entropy(x @ p["head"], ids)

    graph = layers_of(loss, p, tokens())
    decoder = [f"decoder/{i}/{part}" for i in range(3) for part in ("self", "cross", "mlp")]
    assert names(graph)[:3] == ["embedding", "encoder/0", "encoder/1"]
    assert params(graph)[3] == {"embedding", *(f"decoder/0/self/{name}" for name in "qkvo")}
    assert names(graph)[4:] == [*decoder[1:], "head"]


def test_keys_and_values_of_an_earlier_layer_pass_by():
    p = {
        **language_model(0),
        "attention": [attention_params(i) for i in range(4)],
        "mlp": [block_params(10 + i) for i in range(4)],
    }

    def loss(p, ids):
        x, keys, values = p["embedding"][ids], None, None
        for i in range(4):
            weights = p["attention"][i]
            if i == 0:
                keys, values = x @ weights["k"], x @ weights["v"]
            x = x + jax.nn.softmax(x @ weights["q"] @ keys.mT) @ values @ weights["o"]
            x = x + mlp(p["mlp"][i], x)
        return cross_entropy(x @ p["head"], ids)

    graph = layers_of(loss, p, tokens())
    # Where the keys begin to pass by, nothing says yet that they will.
    assert {"attention/0/k", "mlp/0/up"} <= params(graph)[1]
    assert names(graph)[2:-1] == [f"{part}/{i}" for i in (1, 2, 3) for part in ("attention", "mlp")]


@pytest.mark.parametrize("num_outputs", [1, 3, 4 * WIDTH])
@pytest.mark.parametrize("kept", ["sum", "router"])
def test_a_loss_carried_along_does_not_hide_the_head(num_outputs, kept):
    """Also if the head is much narrower than the stream, or much more than a sum is carried."""
    p = {
        "in": array(WIDTH, WIDTH),
        "blocks": [{**block_params(i), "router": array(WIDTH, 4, seed=i)} for i in range(3)],
        "head": array(WIDTH, num_outputs),
    }

    def loss(p, x):
        x, carried = x @ p["in"], []
        for layer in p["blocks"]:
            gates = x @ layer["router"]
            carried.append(gates if kept == "router" else gates.mean())
            x = x + mlp(layer, x) * jax.nn.softmax(gates)[..., :1]
        share = jax.nn.softmax(jnp.stack(carried))
        return jnp.mean((x @ p["head"]) ** 2) + jnp.mean(share**2)

    graph = layers_of(loss, p, array(4, WIDTH))
    assert names(graph) == ["in", "blocks/0", "blocks/1", "blocks/2", "head"]


def test_the_narrow_places_of_a_mixture_of_experts_are_inside_of_a_layer():
    def expert(i):
        return {"up": array(WIDTH, WIDTH, seed=i), "down": array(WIDTH, WIDTH, seed=i)}

    p = {
        **language_model(0),
        "blocks": [
            {"router": array(WIDTH, 4, seed=i), "experts": [expert(i + j) for j in range(4)]}
            for i in range(3)
        ],
    }

    def loss(p, ids):
        x = p["embedding"][ids]
        for layer in p["blocks"]:
            gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ layer["router"]), 2)
            routed = jnp.einsum("btd,btke->btekd", x, jax.nn.one_hot(chosen, 4))
            outs = [
                jnp.tanh(routed[:, :, i] @ expert["up"]) @ expert["down"]
                for i, expert in enumerate(layer["experts"])
            ]
            x = x + jnp.einsum("ebtkd,btk->btd", jnp.stack(outs), gates)
        return cross_entropy(x @ p["head"], ids)

    graph = layers_of(loss, p, tokens())
    assert names(graph) == ["embedding", "blocks/0", "blocks/1", "blocks/2", "head"]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_remat_is_looked_into_but_not_cut(wrap):
    """Beside an encoder's output, its inside shows that it is a block."""
    p = {
        **language_model(0),
        "encoder": block_params(0),
        "decoder": [
            {"cross": {**attention_params(i), "scale": 1 + array(WIDTH)}, "mlp": block_params(i)}
            for i in range(3)
        ],
    }

    def step(p, x, memory):
        x = x + attention(p["cross"], norm(x, p["cross"]["scale"]), memory)
        return x + mlp(p["mlp"], x)

    def loss(p, ids):
        x = p["embedding"][ids]
        memory = x + mlp(p["encoder"], x)
        for layer in p["decoder"]:
            x = wrap(step)(layer, x, memory)
        return cross_entropy(x @ p["head"], ids)

    graph = layers_of(loss, p, tokens())
    parts = ("",) if wrap is jax.checkpoint else ("/cross", "/mlp")
    decoder = [f"decoder/{i}{part}" for i in range(3) for part in parts]
    assert names(graph) == ["embedding", "encoder", *decoder, "head"]
