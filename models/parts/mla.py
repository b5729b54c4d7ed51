"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: B batch, T and S positions (of queries, of keys), D model width, N heads, Q and C widths
of the compressed queries and of the compressed keys and values, U and R widths of the part of a
key that is not turned and of the part that is, H = U + R, V width of a value, P = R / 2 pairs
that turn.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from models.parts.attention import attend
from models.parts.dense import dense
from models.parts.norm import NormConfig, RMSNorm
from models.parts.rope import turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Stretches rotary positions to longer contexts (YaRN, arXiv 2309.00071).

    Attributes:
      factor: contexts are this many times longer.
      original_positions: of the contexts before.
      fast_turns: pairs that turn more often than this in an original context stay as they are.
      slow_turns: pairs that turn less often than this are slowed down by the whole factor.
      mscale: how far the softmax sharpens with log(factor); 0 not at all.
    """

    factor: float
    original_positions: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    mscale: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"YaRN stretches contexts, but factor is {self.factor}; use 1 or more")
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(
                f"slow_turns {self.slow_turns} and fast_turns {self.fast_turns} bound no ramp; "
                "make slow_turns positive, and the smaller one"
            )

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by: section 3.4's temperature, its logarithm times mscale."""
        return (0.1 * self.mscale * math.log(self.factor) + 1) ** 2

    def slow_down(self, frequencies_P: jax.Array, rope_theta: float) -> jax.Array:
        """Return the frequencies of section 3.2 ("NTK-by-parts").

        Between fast and slow, published code interpolates along the numbers of the pairs, not
        along their turns as the paper does.
        """
        num_pairs = frequencies_P.shape[0]

        def pair_turning(turns: float) -> float:
            wave_length = self.original_positions / turns
            return num_pairs * math.log(wave_length / (2 * math.pi)) / math.log(rope_theta)

        first = max(math.floor(pair_turning(self.fast_turns)), 0)
        # Published code bounds the ramp by the width, of which there are half as many pairs.
        last = min(math.ceil(pair_turning(self.slow_turns)), 2 * num_pairs - 1)
        pairs_P = jnp.arange(num_pairs, dtype=jnp.float32)
        slowed_P = jnp.clip((pairs_P - first) / max(last - first, 1e-3), 0, 1)
        return frequencies_P * (1 - slowed_P) + frequencies_P / self.factor * slowed_P


class LatentConfig(NormConfig, Protocol):
    """The widths of latent attention; queries are not compressed if query_rank is None."""

    @property
    def num_heads(self) -> int: ...

    @property
    def query_rank(self) -> int | None: ...

    @property
    def kv_rank(self) -> int: ...

    @property
    def plain_width(self) -> int: ...

    @property
    def rotary_width(self) -> int: ...

    @property
    def value_width(self) -> int: ...

    @property
    def rope_theta(self) -> float: ...

    @property
    def yarn(self) -> Yarn | None: ...


def latent_attention(config: LatentConfig, x_BTD: jax.Array) -> jax.Array:
    """Maps (B, T, D) to (B, T, D) with parameters of the calling module (equations 37 to 47)."""
    c = config
    key_width = c.plain_width + c.rotary_width
    compressed_BTQ = x_BTD
    if c.query_rank is not None:
        compressed_BTQ = dense(c, "query_down", c.query_rank)(x_BTD)
        compressed_BTQ = RMSNorm(c, name="query_norm")(compressed_BTQ)
    name = "query" if c.query_rank is None else "query_up"
    q_BTNH = dense(c, name, (c.num_heads, key_width))(compressed_BTQ)
    q_BTNU, q_BTNR = jnp.split(q_BTNH, [c.plain_width], axis=-1)

    compressed_BSC, k_BSR = jnp.split(
        dense(c, "kv_down", c.kv_rank + c.rotary_width)(x_BTD), [c.kv_rank], axis=-1
    )
    compressed_BSC = RMSNorm(c, name="kv_norm")(compressed_BSC)
    kv_up = dense(c, "kv_up", (c.num_heads, c.plain_width + c.value_width))
    k_BSNU, v_BSNV = jnp.split(kv_up(compressed_BSC), [c.plain_width], axis=-1)

    q_BTNR, k_BS1R = _turn(c, q_BTNR), _turn(c, k_BSR[:, :, None])
    q_BTNH = jnp.concatenate([q_BTNU, q_BTNR], axis=-1)
    k_BSNR = jnp.broadcast_to(k_BS1R, (*k_BSNU.shape[:3], c.rotary_width))
    k_BSNH = jnp.concatenate([k_BSNU, k_BSNR], axis=-1)
    scale = key_width**-0.5 * (1.0 if c.yarn is None else c.yarn.score_scale)
    # Flash attention wants values as wide as keys.
    v_BSNH = jnp.pad(v_BSNV, [(0, 0), (0, 0), (0, 0), (0, key_width - c.value_width)])
    out_BTNH = attend(q_BTNH, k_BSNH, v_BSNH, scale=scale)
    return dense(c, "out", x_BTD.shape[-1], axis=(-2, -1))(out_BTNH[..., : c.value_width])


def _turn(config: LatentConfig, x_BTNR: jax.Array) -> jax.Array:
    """Turns the pairs (2 i, 2 i + 1); returns all first halves, then all second.

    Queries and keys come back in the same order, which their scalar products do not depend on.
    """
    halves_BTNR = jnp.concatenate([x_BTNR[..., ::2], x_BTNR[..., 1::2]], axis=-1)
    exponents_P = -jnp.arange(0, config.rotary_width, 2, dtype=jnp.float32) / config.rotary_width
    frequencies_P = config.rope_theta**exponents_P
    if config.yarn is not None:
        frequencies_P = config.yarn.slow_down(frequencies_P, config.rope_theta)
    return turn(halves_BTNR, frequencies_P)
