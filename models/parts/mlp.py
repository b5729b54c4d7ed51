"""The gated MLP. Shapes: B batch, T positions, D model width, F hidden width."""

from collections.abc import Callable

import jax
from flax import linen as nn

from models.parts.dense import Types, dense


def gated_mlp(
    config: Types,
    x_BTD: jax.Array,
    mlp_width: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> jax.Array:
    """Maps (B, T, D) to (B, T, D) with matmuls of the calling module.

    SwiGLU with silu, GeGLU with gelu (arXiv 2002.05202, equation 6).
    """
    gate_BTF = dense(config, "gate", mlp_width)(x_BTD)
    up_BTF = dense(config, "up", mlp_width)(x_BTD)
    return dense(config, "down", x_BTD.shape[-1])(activation(gate_BTF) * up_BTF)
