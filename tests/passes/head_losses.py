"""Cross-entropies as people write them, and the parameters and tokens that they read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.passes.small_models import array

BATCH, LENGTH, WIDTH, VOCAB = 2, 5, 12, 50
PARAMS = {
    "embedding": array(VOCAB, WIDTH) * 5,
    "head": {"kernel": array(WIDTH, VOCAB, seed=1), "bias": array(VOCAB, seed=2)},
}
IDS = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)


def hidden(p, ids):
    return jnp.tanh(p["embedding"][ids])


def logits_of(p, ids):
    return hidden(p, ids) @ p["head"]["kernel"] + p["head"]["bias"]


def pick(values, ids):
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


LOSSES: dict[str, Any] = {}


def loss(fun):
    LOSSES[fun.__name__] = fun
    return fun


@loss
def optax_integer_labels(p, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(p, ids), ids).mean()


@loss
def optax_soft_labels(p, ids):
    labels = optax.smooth_labels(jax.nn.one_hot(ids, VOCAB), 0.1)
    return optax.softmax_cross_entropy(logits_of(p, ids), labels).mean()


@loss
def log_softmax_then_shift(p, ids):
    """Positions are dropped, and types changed, behind the log_softmax."""
    log_probs = jax.nn.log_softmax(logits_of(p, ids))[:, :-1].astype(jnp.float32)
    return -pick(log_probs, ids[:, 1:]).mean()


@loss
def one_hot_sum(p, ids):
    return -(jax.nn.log_softmax(logits_of(p, ids)) * jax.nn.one_hot(ids, VOCAB)).sum() / ids.size


@loss
def logsumexp_minus_logit_tied_and_capped(p, ids):
    """With a soft cap and a penalty on the normaliser; the embedding is the head, transposed."""
    logits = jnp.tanh(hidden(p, ids) @ p["embedding"].T * WIDTH**-0.5 / 5) * 5
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return (normaliser - pick(logits, ids) + 1e-2 * normaliser**2).mean()


@loss
def tied_einsum_masked(p, ids):
    """The vocabulary comes first, and some of it is masked away."""
    logits = jnp.einsum("VD,BTD->VBT", p["embedding"], hidden(p, ids))
    logits = jnp.where(jnp.arange(VOCAB)[:, None, None] < 13, -jnp.inf, logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids % 20 + 20, axis=0)
    return jnp.where(ids % 3 > 0, losses, 0).sum() / 7


@loss
def flat_and_indexed(p, ids):
    log_probs = jax.nn.log_softmax(logits_of(p, ids).reshape(-1, VOCAB))
    return -log_probs[jnp.arange(ids.size), ids.reshape(-1)].mean()


@loss
def vmapped(p, ids):
    def example_loss(ids_T):
        log_probs = jax.nn.log_softmax(logits_of(p, ids_T))
        return -jax.vmap(lambda row, i: row[i])(log_probs, ids_T).mean()

    return jax.vmap(example_loss)(ids).mean()


@loss
def by_hand(p, ids):
    logits = logits_of(p, ids)
    logits = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return (jnp.log(jnp.exp(logits).sum(-1)) - pick(logits, ids)).mean()


@loss
def low_rank_change_of_the_kernel(p, ids):
    kernel = p["head"]["kernel"] + p["embedding"][:WIDTH, :3] @ p["embedding"].T[:3]
    return -pick(jax.nn.log_softmax(hidden(p, ids) @ kernel), ids).mean()


def half(p, ids):
    """A bfloat16 matmul; the loss in float32."""
    x, kernel = (a.astype(jnp.bfloat16) for a in (hidden(p, ids), p["head"]["kernel"]))
    log_probs = jax.nn.log_softmax((x @ kernel).astype(jnp.float32))
    return -pick(log_probs, ids).mean()


def smoothed_in_half(p, ids):
    """Label smoothing on large bfloat16 logits; the log-probabilities are of that type, too."""
    logits = (logits_of(p, ids) + 1000.0).astype(jnp.bfloat16)
    labels = 0.9 * jax.nn.one_hot(ids, VOCAB) + 0.1 / VOCAB
    return -(labels * jax.nn.log_softmax(logits).astype(jnp.float32)).sum(-1).mean()
