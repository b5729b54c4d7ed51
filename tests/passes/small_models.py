"""Small models, each of which asks something of the cut or of the gradient.

`MODELS` maps a name to a function that returns (loss function, parameters, batch); every loss
function returns (loss, aux).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import next_token_loss
from models.llama2 import SIZES, Llama2
from passes.layers import LayerGraph
from tests.passes.on_host import layers_of

NUM_BLOCKS, BATCH, LENGTH, WIDTH, VOCAB = 4, 2, 6, 8, 16

TINY = dataclasses.replace(
    SIZES["tiny"],
    vocab_size=32,
    model_width=16,
    mlp_width=24,
    num_blocks=2,
    num_heads=2,
    num_kv_heads=1,
)


def array(*shape, seed=0, dtype=jnp.float32):
    values = np.random.default_rng([seed, *shape]).normal(size=shape) / np.sqrt(shape[0])
    return jnp.asarray(values, dtype)


def blocks(dtype=jnp.float32):
    """Parameters of residual blocks: norm, up, down."""
    return {
        f"block{i}": {
            "scale": 1 + array(WIDTH, seed=10 * i, dtype=dtype),
            "up": array(WIDTH, 4 * WIDTH, seed=10 * i + 1, dtype=dtype),
            "bias": array(4 * WIDTH, seed=10 * i + 2, dtype=dtype),
            "down": array(4 * WIDTH, WIDTH, seed=10 * i + 3, dtype=dtype),
        }
        for i in range(NUM_BLOCKS)
    }


def norm(x, scale):
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * scale


def mlp(p, x):
    return jnp.tanh(norm(x, p["scale"]) @ p["up"] + p["bias"]) @ p["down"]


def float_batch(dtype=jnp.float32):
    return {"x": array(BATCH, WIDTH, seed=91, dtype=dtype), "y": array(BATCH, 3, seed=92)}


def tokens(vocab=VOCAB, length=LENGTH):
    return jnp.asarray(np.random.default_rng(7).integers(0, vocab, (BATCH, length)), jnp.int32)


def residual():
    """Residual blocks in a row, an auxiliary output for each sample, an unused parameter."""
    params = {**blocks(), "head": array(WIDTH, 3, seed=90), "unused": array(3, seed=99)}

    def loss(p, batch):
        x = batch["x"]
        for i in range(NUM_BLOCKS):
            x = x + mlp(p[f"block{i}"], x)
        error = (x @ p["head"] - batch["y"]) ** 2
        return error.mean(), {"errors": error.sum(axis=-1), "constant": jnp.float32(1)}

    return loss, params, float_batch()


def tied():
    """An embedding that is read three times, a skip over all blocks, a mask of the batch."""
    params = {"embedding": array(VOCAB, WIDTH, seed=93), **blocks()}

    def loss(p, batch):
        ids = batch["tokens"]
        mask = (jnp.cumsum(ids, axis=-1) % 3 > 0)[..., None]
        angle = jnp.arange(LENGTH, dtype=jnp.float32)[:, None] / 10
        x = first = p["embedding"][ids]
        for i in range(NUM_BLOCKS):
            y = mlp(p[f"block{i}"], x * jnp.cos(angle))
            x = x + jnp.where(mask, y, 0)
            if i == 1:
                x = x + p["embedding"][(ids + 1) % VOCAB]
        logits = jnp.einsum("BTD,VD->BTV", x + 0.5 * first, p["embedding"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)
        return -picked.mean(), {}

    return loss, params, {"tokens": tokens()}


def auxiliary():
    """A loss of each block is carried along to the end."""
    params = {**blocks(), "head": array(WIDTH, 3, seed=90)}

    def loss(p, batch):
        x, extra = batch["x"], jnp.float32(0)
        for i in range(NUM_BLOCKS):
            y = mlp(p[f"block{i}"], x)
            extra = extra + jnp.mean(y**2)
            x = x + y
        error = ((x @ p["head"] - batch["y"]) ** 2).mean()
        return error + 0.1 * extra, {"error": error, "extra": extra}

    return loss, params, float_batch()


@jax.custom_jvp
def doubling_tanh(x):
    """Tanh, whose gradient is twice the true one: who ignores the rule, differs."""
    return jnp.tanh(x)


@doubling_tanh.defjvp
def _(primals, tangents):
    y = jnp.tanh(primals[0])
    return y, 2 * (1 - y * y) * tangents[0]


@jax.custom_vjp
def reverse_gradient(x):
    """The identity, whose gradient is that of -x."""
    return x


reverse_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def rules():
    """Custom rules, remat, a scan and a branch, one a block."""
    params = {**blocks(), "head": array(WIDTH, 3, seed=90)}

    def in_scan(p, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["up"] @ p["down"]), None), x, length=3)[0]

    def in_branch(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: jnp.sin(mlp(p, x)), lambda: mlp(p, x) / 2)

    kinds = (
        lambda p, x: doubling_tanh(norm(x, p["scale"]) @ p["up"]) @ p["down"],
        jax.checkpoint(lambda p, x: reverse_gradient(mlp(p, x))),
        in_scan,
        in_branch,
    )

    def loss(p, batch):
        x = batch["x"]
        for i, block in enumerate(kinds):
            x = x + block(p[f"block{i}"], x)
        return ((x @ p["head"] - batch["y"]) ** 2).mean(), {}

    return loss, params, float_batch()


def routed():
    """Integers computed from activations choose rows of a table two blocks later."""
    params = {**blocks(), "table": array(WIDTH, WIDTH, seed=94), "head": array(WIDTH, 3, seed=90)}

    def loss(p, batch):
        x, chosen = batch["x"], None
        for i in range(NUM_BLOCKS):
            x = x + mlp(p[f"block{i}"], x)
            if i == 0:
                chosen = jnp.argmax(x, axis=-1)
        x = x + p["table"][chosen]
        error = ((x @ p["head"] - batch["y"]) ** 2).mean()
        return error, {"chosen": chosen}

    return loss, params, float_batch()


def dropout():
    """Random masks from a key of the batch; a layer without parameters between."""
    params = {**blocks(), "head": array(WIDTH, 3, seed=90)}

    def loss(p, batch):
        x = batch["x"]
        for i, key in enumerate(jax.random.split(batch["key"], NUM_BLOCKS)):
            y = mlp(p[f"block{i}"], x)
            x = x + jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y / 0.8, 0)
        return ((x @ p["head"] - batch["y"]) ** 2).mean(), {}

    return loss, params, {**float_batch(), "key": jax.random.key(5)}


def half():
    """Parameters and activations in bfloat16, the loss in float32."""
    params = {**blocks(jnp.bfloat16), "head": array(WIDTH, 3, seed=90, dtype=jnp.bfloat16)}

    def loss(p, batch):
        x = batch["x"]
        for i in range(NUM_BLOCKS):
            x = x + mlp(p[f"block{i}"], x)
        error = (x @ p["head"]).astype(jnp.float32) - batch["y"]
        return (error**2).mean(), {}

    return loss, params, float_batch(jnp.bfloat16)


def frozen():
    """A stage whose input is integers only: the gradient ends before the first blocks."""
    params = {**blocks(), "table": array(WIDTH, WIDTH, seed=94), "head": array(WIDTH, 3, seed=90)}

    def loss(p, batch):
        x = batch["x"]
        for i in range(2):
            x = x + mlp(p[f"block{i}"], x)
        x = p["table"][jnp.argmax(x, axis=-1)]
        for i in range(2, NUM_BLOCKS):
            x = x + mlp(p[f"block{i}"], x)
        return ((x @ p["head"] - batch["y"]) ** 2).mean(), {}

    return loss, params, float_batch()


def llama2():
    """The model of this repository, as users have it."""
    batch = {"tokens": tokens(TINY.vocab_size)}
    shapes = jax.eval_shape(Llama2(TINY).init, jax.random.key(0), batch["tokens"])["params"]
    params = jax.tree.map(lambda x: 0.1 + array(*x.shape), shapes)

    def loss(p, batch):
        return next_token_loss(lambda ids: Llama2(TINY).apply({"params": p}, ids), batch), {}

    return loss, params, batch


MODELS = {
    f.__name__: f for f in (residual, tied, auxiliary, rules, routed, dropout, half, frozen, llama2)
}


@dataclasses.dataclass(frozen=True)
class Case:
    loss: Any
    params: Any
    batch: Any
    graph: LayerGraph


@functools.cache
def case(name):
    """Return a model and its layers; each is made once."""
    loss, params, batch = MODELS[name]()
    return Case(loss, params, batch, layers_of(loss, params, batch, has_aux=True))


def transformer(num_blocks):
    """Return the layers of an embedding, equal blocks and a head."""
    block = {"scale": array(8), "up": array(8, 32), "bias": array(32), "down": array(32, 8)}
    params = {"embedding": array(16, 8), "blocks": [block] * num_blocks, "head": array(8, 16)}

    def loss(p, ids):
        x = p["embedding"][ids]
        for block in p["blocks"]:
            x = x + mlp(block, x)
        return jax.nn.logsumexp(x @ p["head"])

    return layers_of(loss, params, tokens())
