"""Causal attention of grouped queries.

Shapes: B batch, T and S positions (of queries, of keys), N query heads, K key-value heads,
G = N / K query heads that share a key-value head, H head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attends causally, query head n to key-value head n // G, with the softmax in float32.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      scale: of the scores; H ** -0.5 if not given.
      window: how many positions a query sees, its own among them; all before it if not given.
      soft_cap: bounds the scores x to soft_cap * tanh(x / soft_cap) (arXiv 2408.00118).

    Returns:
      (B, T, N, H). On a GPU, in 16 bits and without a soft cap, by cuDNN's flash attention, if that
      takes heads of this width: multiples of 8, up to 256 from Hopper on and up to 128 on Ampere.
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    if soft_cap is not None:
        return _attend_capped(q_BTNH, k_BSKH, v_BSKH, scale, window, soft_cap)
    with jax.numpy_dtype_promotion("standard"):  # of 16 bits and 32, which JAX does in there
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=_implementation(q_BTNH),
        )


def _implementation(q_BTNH: jax.Array) -> Literal["xla", "cudnn"]:
    if jax.default_backend() != "gpu" or q_BTNH.dtype.itemsize != 2:
        return "xla"
    major = int(jax.devices()[0].compute_capability.split(".")[0])  # 8 Ampere, 9 Hopper
    widest, head_width = 256 if major >= 9 else 128, q_BTNH.shape[-1]
    can_flash = major >= 8 and head_width % 8 == 0 and head_width <= widest
    return "cudnn" if can_flash else "xla"


def _attend_capped(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float,
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS * (scale / soft_cap))
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(S)
    visible_TS = (distance_TS >= 0) & (distance_TS < (S if window is None else window))
    weights_BKGTS = jax.nn.softmax(jnp.where(visible_TS, scores_BKGTS, -jnp.inf))
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)
