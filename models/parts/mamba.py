"""The Mamba-2 mixer (arXiv 2405.21060).

Shapes: B batch, T positions, D model width, N heads, H head width, E = N H, G groups of heads,
R = N / G heads of a group, S state width, C = E + 2 G S channels of the convolution, K width of
the convolution, Z chunks, L and M positions of a chunk (written and read).
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from models.parts.dense import dense
from models.parts.norm import NormConfig, RMSNorm


class MambaConfig(NormConfig, Protocol):
    """The widths of a mixer; chunk_length changes the speed and the memory, not the result."""

    @property
    def model_width(self) -> int: ...

    @property
    def num_mamba_heads(self) -> int: ...

    @property
    def mamba_head_width(self) -> int: ...

    @property
    def num_mamba_groups(self) -> int: ...

    @property
    def state_width(self) -> int: ...

    @property
    def convolution_width(self) -> int: ...

    @property
    def chunk_length(self) -> int: ...


class Mamba(nn.Module):
    """Maps the residual stream (B, T, D) to what a Mamba-2 mixer adds to it (section 7.1)."""

    config: MambaConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        N, G = c.num_mamba_heads, c.num_mamba_groups
        E, GS = N * c.mamba_head_width, G * c.state_width
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        z_BTE, xBC_BTC, dt_BTN = jnp.split(
            dense(c, "in", 2 * E + 2 * GS + N)(x_BTD), [E, 2 * E + 2 * GS], axis=-1
        )
        x_BTE, B_BTGS, C_BTGS = jnp.split(
            nn.silu(Convolution(c, name="convolution")(xBC_BTC)), [E, E + GS], axis=-1
        )
        x_BTNH = x_BTE.reshape(*x_BTE.shape[:2], N, -1)
        dt_bias_N, A_log_N, D_N = (
            self.param(name, initial, (N,), c.param_dtype).astype(jnp.float32)
            for name, initial in (
                ("dt_bias", _initial_dt_bias),
                ("A_log", _initial_A_log),
                ("D", nn.initializers.ones),
            )
        )
        y_BTNH = chunk_scan(
            x_BTNH,
            nn.softplus(dt_BTN.astype(jnp.float32) + dt_bias_N),
            -jnp.exp(A_log_N),
            B_BTGS.reshape(*B_BTGS.shape[:2], G, -1),
            C_BTGS.reshape(*C_BTGS.shape[:2], G, -1),
            chunk_length=c.chunk_length,
        )
        y_BTNH += D_N[:, None] * x_BTNH.astype(jnp.float32)
        gated_BTE = GatedNorm(c, name="gated_norm")(y_BTNH.reshape(z_BTE.shape), z_BTE)
        return dense(c, "out", c.model_width)(gated_BTE)


def chunk_scan(
    x_BTNH: jax.Array,
    dt_BTN: jax.Array,
    A_N: jax.Array,
    B_BTGS: jax.Array,
    C_BTGS: jax.Array,
    *,
    chunk_length: int,
) -> jax.Array:
    """Runs the recurrence of every head (section 6), from a state (S, H) of zeros.

    state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t, and y_t = C_t state_t. Inside of a chunk the
    states are never made: a position reads those before it by matmuls, as in attention without a
    softmax. Between chunks goes one state of a head.

    Args:
      x_BTNH: inputs. The matmuls multiply in its type and add in float32.
      dt_BTN: steps, float32 and not negative.
      A_N: rates of decay, float32 and negative.
      B_BTGS: what writes to the states; head n has that of group n // R.
      C_BTGS: what reads from the states, likewise.
      chunk_length: positions of a chunk; T need not be a multiple. On a CPU 64 is quickest.

    Returns:
      y (B, T, N, H), float32.
    """
    B, T, N, H = x_BTNH.shape
    G, R = B_BTGS.shape[2], N // B_BTGS.shape[2]
    L = min(chunk_length, T)

    def chunked(x: jax.Array, *heads: int) -> jax.Array:
        # What is added has dt = 0: it leaves the state as it is, and is cut off in the end.
        padded = jnp.pad(x, [(0, 0), (0, -T % L)] + [(0, 0)] * (x.ndim - 2))
        x_BZL = padded.reshape(B, -1, L, *heads, *x.shape[3:])
        # Heads before positions, once for all: so every matmul is of matrices in one piece.
        return jnp.moveaxis(x_BZL, 2, 2 + len(heads))

    x_BZGRLH, dt_BZGRL = chunked(x_BTNH, G, R), chunked(dt_BTN, G, R)
    B_BZGLS, C_BZGLS = chunked(B_BTGS, G), chunked(C_BTGS, G)
    # The logarithm of the decay from the beginning of the chunk.
    decay_BZGRL = jnp.cumsum(dt_BZGRL * A_N.reshape(G, R, 1), axis=-1)
    end_BZGR1 = decay_BZGRL[..., -1:]

    scores_BZGLM = _einsum("BZGLS,BZGMS->BZGLM", C_BZGLS, B_BZGLS)
    weights_BZGRLM = _weights(scores_BZGLM, decay_BZGRL, dt_BZGRL, x_BTNH.dtype)
    y_BZGRLH = _einsum("BZGRLM,BZGRMH->BZGRLH", weights_BZGRLM, x_BZGRLH)

    to_end_BZGRL = jnp.exp(end_BZGR1 - decay_BZGRL) * dt_BZGRL
    scaled_BZGRLH = (x_BZGRLH.astype(jnp.float32) * to_end_BZGRL[..., None]).astype(x_BTNH.dtype)
    written_BZGRSH = _einsum("BZGLS,BZGRLH->BZGRSH", B_BZGLS, scaled_BZGRLH)
    state_BZGRSH = _states_before(written_BZGRSH, jnp.exp(end_BZGR1[..., 0]))
    read_BZGRLH = _einsum("BZGLS,BZGRSH->BZGRLH", C_BZGLS, state_BZGRSH.astype(x_BTNH.dtype))
    y_BZGRLH += jnp.exp(decay_BZGRL)[..., None] * read_BZGRLH
    return jnp.moveaxis(y_BZGRLH, 4, 2).reshape(B, -1, N, H)[:, :T]


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _weights(
    scores_BZGLM: jax.Array, decay_BZGRL: jax.Array, dt_BZGRL: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Returns what each position of a chunk reads from those before it, and from itself.

    The largest array of the mixer: the backward keeps it in `dtype` alone, and computes the
    exponentials again.
    """

    @jax.checkpoint
    def weigh(scores_BZGLM: jax.Array, decay_BZGRL: jax.Array, dt_BZGRL: jax.Array) -> jax.Array:
        between_BZGRLM = decay_BZGRL[..., :, None] - decay_BZGRL[..., None, :]
        L = between_BZGRLM.shape[-1]
        # Masked before the exponential, which overflows above the diagonal.
        decays_BZGRLM = jnp.exp(jnp.where(jnp.tri(L, dtype=bool), between_BZGRLM, -jnp.inf))
        weights_BZGRLM = scores_BZGLM[:, :, :, None] * decays_BZGRLM * dt_BZGRL[..., None, :]
        return weights_BZGRLM.astype(dtype)

    return weigh(scores_BZGLM, decay_BZGRL, dt_BZGRL)


def _states_before(written_BZGRSH: jax.Array, decay_BZGR: jax.Array) -> jax.Array:
    """Returns the state before each chunk, from what each writes and how far it decays others.

    One chunk after the other: on a CPU as quick as an associative scan, the gradient quicker.
    """

    def step(
        state_BGRSH: jax.Array, chunk: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        written_BGRSH, decay_BGR = chunk
        return decay_BGR[..., None, None] * state_BGRSH + written_BGRSH, state_BGRSH

    chunks = jnp.moveaxis(written_BZGRSH, 1, 0), jnp.moveaxis(decay_BZGR, 1, 0)
    _, state_ZBGRSH = jax.lax.scan(step, jnp.zeros_like(written_BZGRSH[:, 0]), chunks)
    return jnp.moveaxis(state_ZBGRSH, 0, 1)


class Convolution(nn.Module):
    """Convolves each channel of (B, T, C) with its own K weights over the K last positions.

    It adds up in float32.
    """

    config: MambaConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> jax.Array:
        c = self.config
        K, num_channels, T = c.convolution_width, x_BTC.shape[2], x_BTC.shape[1]
        # As PyTorch begins, and as it stores: uniform up to K ** -0.5.
        initial = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=(1, 2), out_axis=0
        )
        kernel_C1K = self.param("kernel", initial, (num_channels, 1, K), c.param_dtype)
        bias_C = self.param("bias", nn.initializers.zeros, (num_channels,), c.param_dtype)
        x_BTC = jnp.pad(x_BTC, [(0, 0), (K - 1, 0), (0, 0)])
        kernel_CK, bias_C = (a.astype(jnp.float32) for a in (kernel_C1K[:, 0], bias_C))
        taps = [x_BTC[:, k : k + T].astype(jnp.float32) * kernel_CK[:, k] for k in range(K)]
        return sum(taps, start=bias_C).astype(c.dtype)


class GatedNorm(nn.Module):
    """RMSNorm of x * silu(z), both (B, T, E), in G groups of channels on their own, in float32."""

    config: MambaConfig

    @nn.compact
    def __call__(self, x_BTE: jax.Array, z_BTE: jax.Array) -> jax.Array:
        c = self.config
        scale_E = self.param("scale", nn.initializers.ones, x_BTE.shape[-1:], c.param_dtype)
        gated_BTE = x_BTE.astype(jnp.float32) * nn.silu(z_BTE.astype(jnp.float32))
        gated = gated_BTE.reshape(*x_BTE.shape[:2], c.num_mamba_groups, -1)
        mean_square = jnp.mean(gated**2, axis=-1, keepdims=True)
        normed_BTE = (gated * jax.lax.rsqrt(mean_square + c.norm_epsilon)).reshape(x_BTE.shape)
        return (normed_BTE * scale_E.astype(jnp.float32)).astype(c.dtype)


def _initial_dt_bias(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns biases whose softplus is between 0.001 and 0.1, uniform in the logarithm."""
    low, high = jnp.log(0.001), jnp.log(0.1)
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    return jnp.log(jnp.expm1(dt)).astype(dtype)


def _initial_A_log(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns logarithms of rates, uniform between 1 and 16."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1, 16)).astype(dtype)
