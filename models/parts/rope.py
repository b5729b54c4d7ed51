"""Rotary positions (RoFormer, arXiv 2104.09864).

Shapes: B batch, T positions, N heads, H head width, P = H / 2 pairs that turn.
"""

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, rope_theta: float, *, slower: float = 1.0) -> jax.Array:
    """Turns the pair (i, i + H / 2) of every head by position * rope_theta ** (-2 i / H) radians.

    The scalar product of a turned query and a turned key depends on the distance between their
    positions only (equation 16). All angles are divided by `slower`, for longer contexts
    (arXiv 2306.15595).
    """
    head_width = x_BTNH.shape[3]
    frequencies_P = rope_theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    return turn(x_BTNH, frequencies_P / slower)


def turn(x_BTNH: jax.Array, frequencies_P: jax.Array) -> jax.Array:
    """Turns the pair (i, i + H / 2) of every head by position * frequencies_P[i] radians."""
    positions_T11 = jnp.arange(x_BTNH.shape[1], dtype=jnp.float32)[:, None, None]
    angles_T1P = positions_T11 * frequencies_P
    cos_T1P, sin_T1P = jnp.cos(angles_T1P), jnp.sin(angles_T1P)
    a_BTNP, b_BTNP = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned_BTNH = jnp.concatenate(
        [a_BTNP * cos_T1P - b_BTNP * sin_T1P, b_BTNP * cos_T1P + a_BTNP * sin_T1P], axis=-1
    )
    return turned_BTNH.astype(x_BTNH.dtype)
