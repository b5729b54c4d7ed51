"""Gemma 1, 2 and 3 (arXiv 2403.08295, 2408.00118, 2503.19786), of Gemma 3 the text model.

All have tied embeddings, RMSNorm around one, rotary positions, GeGLU. Gemma 2 adds norms behind
attention and MLP, soft caps, and attention that is local in every other block; Gemma 3 has norms
of queries and keys in place of the caps, and is local in five blocks out of six.

Shapes: B batch, T and S positions (of queries, of keys), D model width, N query heads,
K key-value heads, H head width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from models.parts.attention import attend
from models.parts.dense import dense
from models.parts.embed import Embed
from models.parts.mlp import gated_mlp
from models.parts.norm import RMSNorm
from models.parts.rope import rotate

# Every which block attends globally, by generation.
_GLOBAL_EVERY = {1: 1, 2: 2, 3: 6}
# The generations that need, and that may have, a setting that not all have.
_NEEDED_BY = {"window": (2, 3), "query_pre_attn_scalar": (2, 3), "local_rope_theta": (3,)}
_OPTIONAL_FOR = {"score_soft_cap": (2,), "logit_soft_cap": (2,), "rope_slower": (3,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Widths and types of one Gemma: computes in dtype, stores parameters in param_dtype.

    Attributes:
      window: how many positions a query of a local block sees, its own among them.
      query_pre_attn_scalar: its root divides the scores; in Gemma 1 the root of head_width does.
      score_soft_cap: bounds the scores of attention (2408.00118, section 2).
      logit_soft_cap: bounds the logits, likewise.
      local_rope_theta: takes the place of rope_theta in local blocks.
      rope_slower: divides the angles of global blocks.
      remat: the backward has only what goes into a block, and computes the rest again.
    """

    generation: int
    vocab_size: int
    model_width: int
    mlp_width: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    window: int | None = None
    query_pre_attn_scalar: int | None = None
    score_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    rope_slower: float | None = None
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        if self.generation not in _GLOBAL_EVERY:
            raise ValueError(f"there is no Gemma {self.generation} here; use generation 1, 2 or 3")
        if self.head_width % 2:
            raise ValueError(
                f"head_width {self.head_width} does not give pairs that turn; make it even"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_kv_heads} key-value heads cannot be shared evenly by {self.num_heads} "
                "query heads; make num_kv_heads a divisor of num_heads"
            )
        for name, generations in (_NEEDED_BY | _OPTIONAL_FOR).items():
            given = getattr(self, name) is not None
            if given and self.generation not in generations:
                raise ValueError(f"Gemma {self.generation} has no {name}; leave it out")
            if not given and self.generation in _NEEDED_BY.get(name, ()):
                raise ValueError(f"Gemma {self.generation} needs {name}; give it")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"a query sees {self.window} positions, not even its own; make window 1 or more"
            )

    @property
    def score_scale(self) -> float:
        return (self.query_pre_attn_scalar or self.head_width) ** -0.5

    def is_local(self, block: int) -> bool:
        """Return whether this block, from 0, sees no further than the window."""
        return (block + 1) % _GLOBAL_EVERY[self.generation] != 0


_GEMMA2: Mapping[str, Any] = {
    "generation": 2,
    "vocab_size": 256_000,
    "window": 4096,
    "score_soft_cap": 50.0,
    "logit_soft_cap": 30.0,
}
_GEMMA3: Mapping[str, Any] = {
    "generation": 3,
    "rope_theta": 1_000_000.0,
    "local_rope_theta": 10_000.0,
}

SIZES: Mapping[str, GemmaConfig] = MappingProxyType(
    {
        "2B": GemmaConfig(
            generation=1,
            vocab_size=256_000,
            model_width=2048,
            mlp_width=16_384,
            num_blocks=18,
            num_heads=8,
            num_kv_heads=1,
            head_width=256,
        ),
        "7B": GemmaConfig(
            generation=1,
            vocab_size=256_000,
            model_width=3072,
            mlp_width=24_576,
            num_blocks=28,
            num_heads=16,
            num_kv_heads=16,
            head_width=256,
        ),
        "2-2B": GemmaConfig(
            **_GEMMA2,
            model_width=2304,
            mlp_width=9216,
            num_blocks=26,
            num_heads=8,
            num_kv_heads=4,
            head_width=256,
            query_pre_attn_scalar=256,
        ),
        "2-9B": GemmaConfig(
            **_GEMMA2,
            model_width=3584,
            mlp_width=14_336,
            num_blocks=42,
            num_heads=16,
            num_kv_heads=8,
            head_width=256,
            query_pre_attn_scalar=256,
        ),
        "2-27B": GemmaConfig(
            **_GEMMA2,
            model_width=4608,
            mlp_width=36_864,
            num_blocks=46,
            num_heads=32,
            num_kv_heads=16,
            head_width=128,
            query_pre_attn_scalar=4608 // 32,
        ),
        "3-1B": GemmaConfig(
            **_GEMMA3,
            vocab_size=262_144,
            model_width=1152,
            mlp_width=6912,
            num_blocks=26,
            num_heads=4,
            num_kv_heads=1,
            head_width=256,
            query_pre_attn_scalar=256,
            window=512,
        ),
        # From here on 64 tokens more, as stored with the image encoder.
        "3-4B": GemmaConfig(
            **_GEMMA3,
            vocab_size=262_208,
            model_width=2560,
            mlp_width=10_240,
            num_blocks=34,
            num_heads=8,
            num_kv_heads=4,
            head_width=256,
            query_pre_attn_scalar=256,
            window=1024,
            rope_slower=8.0,
        ),
        "3-12B": GemmaConfig(
            **_GEMMA3,
            vocab_size=262_208,
            model_width=3840,
            mlp_width=15_360,
            num_blocks=48,
            num_heads=16,
            num_kv_heads=8,
            head_width=256,
            query_pre_attn_scalar=256,
            window=1024,
            rope_slower=8.0,
        ),
        "3-27B": GemmaConfig(
            **_GEMMA3,
            vocab_size=262_208,
            model_width=5376,
            mlp_width=21_504,
            num_blocks=62,
            num_heads=32,
            num_kv_heads=16,
            head_width=128,
            query_pre_attn_scalar=5376 // 32,
            window=1024,
            rope_slower=8.0,
        ),
        # Not published: learns bytes, yet has so large a vocabulary that the head has the share
        # of the parameters that it has in the 2B, a fifth, and more of them than a block.
        "small": GemmaConfig(
            generation=1,
            vocab_size=4096,
            model_width=256,
            mlp_width=512,
            num_blocks=8,
            num_heads=8,
            num_kv_heads=1,
            head_width=32,
            dtype=jnp.float32,
        ),
        "tiny": GemmaConfig(
            generation=1,
            vocab_size=2048,
            model_width=128,
            mlp_width=256,
            num_blocks=6,
            num_heads=6,
            num_kv_heads=1,
            head_width=32,
            dtype=jnp.float32,
        ),
    }
)


def _norm(config: GemmaConfig, name: str) -> RMSNorm:
    return RMSNorm(config, around_one=True, name=name)


class Attention(nn.Module):
    """Maps the residual stream (B, T, D) to what grouped-query attention adds to it."""

    config: GemmaConfig
    local: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        x_BTD = _norm(c, "norm")(x_BTD)
        q_BTNH = dense(c, "query", (c.num_heads, c.head_width))(x_BTD)
        k_BSKH = dense(c, "key", (c.num_kv_heads, c.head_width))(x_BTD)
        v_BSKH = dense(c, "value", (c.num_kv_heads, c.head_width))(x_BTD)
        if c.generation == 3:
            q_BTNH, k_BSKH = _norm(c, "query_norm")(q_BTNH), _norm(c, "key_norm")(k_BSKH)
        theta, slower = c.rope_theta, c.rope_slower or 1.0
        if self.local:  # which Gemma 2 turns as it does the global ones
            theta, slower = c.local_rope_theta or c.rope_theta, 1.0
        out_BTNH = attend(
            rotate(q_BTNH, theta, slower=slower),
            rotate(k_BSKH, theta, slower=slower),
            v_BSKH,
            scale=c.score_scale,
            window=c.window if self.local else None,
            soft_cap=c.score_soft_cap,
        )
        out_BTD = dense(c, "out", c.model_width, axis=(-2, -1))(out_BTNH)
        return out_BTD if c.generation == 1 else _norm(c, "post_norm")(out_BTD)


class MLP(nn.Module):
    """Maps the residual stream (B, T, D) to what GeGLU adds to it."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        # nn.gelu is the approximation by tanh, with which all Gemmas were trained.
        out_BTD = gated_mlp(c, _norm(c, "norm")(x_BTD), c.mlp_width, activation=nn.gelu)
        return out_BTD if c.generation == 1 else _norm(c, "post_norm")(out_BTD)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream (B, T, D)."""

    config: GemmaConfig
    local: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD += Attention(self.config, self.local, name="attention")(x_BTD)
        return x_BTD + MLP(self.config, name="mlp")(x_BTD)


class Gemma(nn.Module):
    """Maps tokens (B, T), integers below V, to the logits (B, T, V) of the token after each.

    With before_head, returns the factors of the logits: hidden states (B, T, D), kernel (D, V),
    which is the embedding transposed.

    Raises:
      ValueError: before_head, of a config that caps the logits.
    """

    config: GemmaConfig

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, *, before_head: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        c = self.config
        if before_head and c.logit_soft_cap is not None:
            raise ValueError(
                f"logits capped at {c.logit_soft_cap} are no product of hidden states and a "
                "kernel; call without before_head, or set logit_soft_cap to None"
            )
        embed = Embed(c, name="embed")
        # The factor is rounded to dtype, as it was in training: 55.5 for the square root of 3072.
        x_BTD = embed(tokens_BT) * jnp.asarray(c.model_width**0.5, c.dtype)
        block = nn.remat(Block) if c.remat else Block
        for i in range(c.num_blocks):
            x_BTD = block(c, c.is_local(i), name=f"layers_{i}")(x_BTD)
        x_BTD = _norm(c, "norm")(x_BTD)
        kernel_DV = embed.embedding.T
        if before_head:
            return x_BTD, kernel_DV
        logits_BTV = x_BTD @ kernel_DV.astype(c.dtype)
        if c.logit_soft_cap is None:
            return logits_BTV
        return c.logit_soft_cap * jnp.tanh(logits_BTV / c.logit_soft_cap)
