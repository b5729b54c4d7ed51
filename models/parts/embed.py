"""The embedding of a language model. Shapes: B batch, T positions, D model width, V vocabulary."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.parts.head import HeadConfig


class Embed(nn.Module):
    """Maps tokens (B, T), integers below V, to their rows (B, T, D) of `embedding` (V, D).

    Rows are taken from the parameter as it is, and then rounded to dtype. So the gradient of a
    token that comes often adds up in param_dtype, where that of nn.Embed adds up in dtype.
    """

    config: HeadConfig

    def setup(self) -> None:
        c = self.config
        initial = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        shape = (c.vocab_size, c.model_width)
        self.embedding = self.param("embedding", initial, shape, c.param_dtype)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, tokens_BT, axis=0).astype(self.config.dtype)
