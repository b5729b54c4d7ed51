"""What the language models are trained on: predicting the next token.

Shapes: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def next_token_loss(
    model: Callable[[jax.Array], jax.Array], batch: Mapping[str, jax.Array]
) -> jax.Array:
    """Returns the mean cross-entropy of every token given those before it, in nats.

    Args:
        model: maps tokens (B, T) to logits (B, T, V), of any float type.
        batch: "tokens", integers (B, T + 1); the first T are read, the last T are predicted.

    Returns:
        A float32 scalar, computed in float32 whatever the type of the logits.
    """
    tokens = batch["tokens"]
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    log_probs_BTV = jax.nn.log_softmax(model(inputs_BT).astype(jnp.float32))
    target_log_probs_BT1 = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)
    return -target_log_probs_BT1.mean()
