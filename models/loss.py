"""What the language models are trained on: predicting the next token.

Shapes: B batch, T positions, D model width, V vocabulary, U a slice of the vocabulary.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp


def next_token_loss(
    model: Callable[..., Any], batch: Mapping[str, jax.Array], *, head_slices: int = 1
) -> jax.Array:
    """Returns the mean cross-entropy of every token given those before it, in nats.

    Args:
        model: maps tokens (B, T) to logits (B, T, V), of any float type. With more than one slice
            it is called with before_head=True, and returns the factors of the logits instead:
            hidden states (B, T, D) and a kernel (D, V).
        batch: "tokens", integers (B, T + 1); the first T are read, the last T are predicted.
        head_slices: parts of the vocabulary, whose logits are made one after the other.

    Returns:
        A float32 scalar, computed in float32 whatever the type of the logits.
    """
    tokens = batch["tokens"]
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    if head_slices != 1:
        x_BTD, kernel_DV = model(inputs_BT, before_head=True)
        return sliced_cross_entropy(x_BTD, kernel_DV, targets_BT, head_slices).mean()
    return cross_entropy(model(inputs_BT), targets_BT).mean()


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns the cross-entropy (B, T) of targets, integers below V, in nats and float32."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]


def sliced_cross_entropy(
    x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, num_slices: int
) -> jax.Array:
    """Returns the cross-entropy (B, T) of targets under logits x_BTD @ kernel_DV, in float32.

    The logits are made in slices of the vocabulary, between which three numbers a token are
    carried: the maximum m, the sum s of exp(logit - m), the target's logit t (arXiv 1805.02867,
    algorithm 3). The backward keeps the logits in the type of x_BTD.

    Raises:
        ValueError: there are not between 1 and V slices.
    """
    vocab_size = kernel_DV.shape[1]
    if not 1 <= num_slices <= vocab_size:
        raise ValueError(
            f"{num_slices} slices of a vocabulary of {vocab_size}; use 1 to {vocab_size}"
        )
    # As in the whole: negative targets count from the end, and others outside give nan.
    targets_BT1 = targets_BT.astype(jnp.int32)[..., None]
    targets_BT1 += jnp.where(targets_BT1 < 0, vocab_size, 0)
    inside_BT1 = (targets_BT1 >= 0) & (targets_BT1 < vocab_size)
    m_BT1 = jnp.full(targets_BT1.shape, -jnp.inf, jnp.float32)
    s_BT1 = t_BT1 = jnp.zeros_like(m_BT1)
    for start, stop in pairwise(i * vocab_size // num_slices for i in range(num_slices + 1)):
        logits_BTU = x_BTD @ kernel_DV[:, start:stop].astype(x_BTD.dtype)
        logits_BTU = logits_BTU.astype(jnp.float32)
        # The result does not depend on m, so m has no gradient.
        old_BT1 = jax.lax.stop_gradient(m_BT1)
        max_BT1 = jax.lax.stop_gradient(logits_BTU).max(axis=-1, keepdims=True)
        m_BT1 = jnp.maximum(old_BT1, max_BT1)
        s_BT1 = _add_exp(s_BT1, old_BT1, m_BT1, logits_BTU)
        at_BT1 = jnp.clip(targets_BT1 - start, 0, stop - start - 1)
        here_BT1 = (targets_BT1 >= start) & (targets_BT1 < stop)
        t_BT1 += jnp.where(here_BT1, jnp.take_along_axis(logits_BTU, at_BT1, axis=-1), 0)
    return jnp.where(inside_BT1, jnp.log(s_BT1) + m_BT1 - t_BT1, jnp.nan)[..., 0]


@jax.checkpoint  # the exponentials are computed again from the logits
def _add_exp(
    s_BT1: jax.Array, old_BT1: jax.Array, m_BT1: jax.Array, logits_BTU: jax.Array
) -> jax.Array:
    total_BT1 = jnp.exp(logits_BTU - m_BT1).sum(axis=-1, keepdims=True)
    return s_BT1 * jnp.exp(old_BT1 - m_BT1) + total_BT1
