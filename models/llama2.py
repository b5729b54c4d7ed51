"""LLaMA-2 (arXiv 2307.09288): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Shapes: B batch, T and S positions (of queries, of keys), D model width, N query heads,
K key-value heads, H head width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from models.parts.attention import attend
from models.parts.dense import dense
from models.parts.embed import Embed
from models.parts.head import Head
from models.parts.mlp import gated_mlp
from models.parts.norm import RMSNorm
from models.parts.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama2Config:
    """Widths and types of one LLaMA-2: computes in dtype, stores parameters in param_dtype.

    With remat, the backward has only what goes into a block, and computes the rest again.
    """

    vocab_size: int
    model_width: int
    mlp_width: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        if self.model_width % (2 * self.num_heads):
            raise ValueError(
                f"model_width {self.model_width} does not give {self.num_heads} heads of equal "
                f"and even width; make it a multiple of {2 * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_kv_heads} key-value heads cannot be shared evenly by {self.num_heads} "
                "query heads; make num_kv_heads a divisor of num_heads"
            )

    @property
    def head_width(self) -> int:
        return self.model_width // self.num_heads


SIZES: Mapping[str, Llama2Config] = MappingProxyType(
    {
        "7B": Llama2Config(
            vocab_size=32_000,
            model_width=4096,
            mlp_width=11_008,
            num_blocks=32,
            num_heads=32,
            num_kv_heads=32,
        ),
        "13B": Llama2Config(
            vocab_size=32_000,
            model_width=5120,
            mlp_width=13_824,
            num_blocks=40,
            num_heads=40,
            num_kv_heads=40,
        ),
        "70B": Llama2Config(
            vocab_size=32_000,
            model_width=8192,
            mlp_width=28_672,
            num_blocks=80,
            num_heads=64,
            num_kv_heads=8,
        ),
        # Not published: over bytes, and small enough to learn in a minute on two CPU cores.
        "small": Llama2Config(
            vocab_size=256,
            model_width=256,
            mlp_width=704,
            num_blocks=8,
            num_heads=8,
            num_kv_heads=4,
            dtype=jnp.float32,
        ),
        "tiny": Llama2Config(
            vocab_size=256,
            model_width=128,
            mlp_width=352,
            num_blocks=4,
            num_heads=4,
            num_kv_heads=2,
            dtype=jnp.float32,
        ),
    }
)


class Attention(nn.Module):
    """Maps the residual stream (B, T, D) to what grouped-query attention adds to it."""

    config: Llama2Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        q_BTNH = dense(c, "query", (c.num_heads, c.head_width))(x_BTD)
        k_BSKH = dense(c, "key", (c.num_kv_heads, c.head_width))(x_BTD)
        v_BSKH = dense(c, "value", (c.num_kv_heads, c.head_width))(x_BTD)
        out_BTNH = attend(rotate(q_BTNH, c.rope_theta), rotate(k_BSKH, c.rope_theta), v_BSKH)
        return dense(c, "out", c.model_width, axis=(-2, -1))(out_BTNH)


class MLP(nn.Module):
    """Maps the residual stream (B, T, D) to what SwiGLU adds to it."""

    config: Llama2Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        return gated_mlp(c, RMSNorm(c, name="norm")(x_BTD), c.mlp_width)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream (B, T, D)."""

    config: Llama2Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD += Attention(self.config, name="attention")(x_BTD)
        return x_BTD + MLP(self.config, name="mlp")(x_BTD)


class Llama2(nn.Module):
    """Maps tokens (B, T), integers below V, to the logits (B, T, V) of the token after each.

    With before_head, returns the factors of the logits: hidden states (B, T, D), kernel (D, V).
    """

    config: Llama2Config

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, *, before_head: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        c = self.config
        x_BTD = Embed(c, name="embed")(tokens_BT)
        block = nn.remat(Block) if c.remat else Block
        for i in range(c.num_blocks):
            x_BTD = block(c, name=f"layers_{i}")(x_BTD)
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        kernel_DV = Head(c, name="head")()
        return (x_BTD, kernel_DV) if before_head else x_BTD @ kernel_DV.astype(c.dtype)
