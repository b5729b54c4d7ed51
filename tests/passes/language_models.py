"""Parameters of small language models, their loss, and what its layers are called."""

import jax
import jax.numpy as jnp

from tests.passes.small_models import array

WIDTH, HIDDEN, VOCAB = 8, 32, 16


def names(graph):
    return [layer.name for layer in graph.layers]


def params(graph):
    return [{graph.program.params[p] for p in layer.params} for layer in graph.layers]


def block_params(seed):
    return {
        "scale": 1 + array(WIDTH, seed=seed),
        "up": array(WIDTH, HIDDEN, seed=seed + 1),
        "bias": array(HIDDEN, seed=seed + 2),
        "down": array(HIDDEN, WIDTH, seed=seed + 3),
    }


def language_model(num_blocks=3):
    """Parameters of an embedding, blocks and a head."""
    return {
        "embedding": array(VOCAB, WIDTH),
        "blocks": [block_params(10 * i) for i in range(num_blocks)],
        "head": array(WIDTH, VOCAB),
    }


def cross_entropy(logits, ids):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1).mean()
