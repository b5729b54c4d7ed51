import jax.numpy as jnp
import numpy as np
import pytest

from models.loss import next_token_loss


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_loss_is_the_mean_cross_entropy_of_the_next_token(offset):
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(size=(2, 5, 7)) + offset
    tokens = rng.integers(0, 7, size=(2, 6))
    seen = []

    def model(tokens_BT):
        seen.append(np.asarray(tokens_BT))
        return jnp.asarray(logits_BTV, jnp.float32)

    loss = next_token_loss(model, {"tokens": jnp.asarray(tokens, jnp.int32)})

    shifted = logits_BTV - logits_BTV.max(-1, keepdims=True)
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    expected = -np.mean([np.log(probs[b, t, tokens[b, t + 1]]) for b in range(2) for t in range(5)])
    # Near 1e4, float32 logits are 1e-3 apart.
    np.testing.assert_allclose(loss, expected, rtol=1e-6 if offset == 0 else 1e-3)
    np.testing.assert_array_equal(seen[0], tokens[:, :-1])


def test_loss_of_low_precision_logits_is_float32():
    loss = next_token_loss(
        lambda tokens_BT: jnp.zeros((*tokens_BT.shape, 256), jnp.bfloat16),
        {"tokens": jnp.zeros((1, 4), jnp.int32)},
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(256), rtol=1e-6)
