"""RMSNorm. Shapes: D width."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.parts.dense import Types


class NormConfig(Types, Protocol):
    """Types, and what is added to the mean square."""

    @property
    def norm_epsilon(self) -> float: ...


class RMSNorm(nn.Module):
    """Divides (..., D) by its root mean square, and scales, in float32 (arXiv 1910.07467, eq. 4).

    With `around_one` the parameter is what the scale has over one.
    """

    config: NormConfig
    around_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        initial = nn.initializers.zeros if self.around_one else nn.initializers.ones
        scale_D = self.param("scale", initial, x.shape[-1:], c.param_dtype)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32**2, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + c.norm_epsilon)
        scale_D = scale_D.astype(jnp.float32)
        return (normed * (1 + scale_D if self.around_one else scale_D)).astype(c.dtype)
