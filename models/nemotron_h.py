"""Nemotron-H (arXiv 2504.03624): layers of Mamba-2, of attention and of MLPs, in a pattern.

Shapes: B batch, T and S positions (of queries, of keys), D model width, N query heads,
K key-value heads, H head width, F hidden width of the MLP, V vocabulary.
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
from models.parts.mamba import Mamba
from models.parts.norm import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class NemotronHConfig:
    """Widths and types of one Nemotron-H: computes in dtype, stores parameters in param_dtype.

    `pattern` has a letter for each layer: M a Mamba-2 mixer, * attention, - an MLP. With remat, the
    backward has only what goes into a layer, and computes the rest again.
    """

    vocab_size: int
    model_width: int
    pattern: str
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_mamba_heads: int
    mamba_head_width: int
    num_mamba_groups: int
    state_width: int
    convolution_width: int = 4
    chunk_length: int = 128
    norm_epsilon: float = 1e-5
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.pattern) - set(MIXERS):
            raise ValueError(
                f"pattern {self.pattern!r} has {', '.join(map(repr, sorted(unknown)))}; "
                "use M for Mamba-2, * for attention and - for an MLP"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_kv_heads} key-value heads cannot be shared evenly by {self.num_heads} "
                "query heads; make num_kv_heads a divisor of num_heads"
            )
        if self.num_mamba_heads % self.num_mamba_groups:
            raise ValueError(
                f"{self.num_mamba_heads} Mamba heads do not make {self.num_mamba_groups} equal "
                "groups; make num_mamba_groups a divisor of num_mamba_heads"
            )
        if self.chunk_length < 1:
            raise ValueError(f"chunk_length is {self.chunk_length}; make it 1 or more")


class Attention(nn.Module):
    """Maps the residual stream (B, T, D) to what grouped-query attention adds to it.

    It is not told positions: the Mamba-2 layers before it know the order.
    """

    config: NemotronHConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        q_BTNH = dense(c, "query", (c.num_heads, c.head_width))(x_BTD)
        k_BSKH = dense(c, "key", (c.num_kv_heads, c.head_width))(x_BTD)
        v_BSKH = dense(c, "value", (c.num_kv_heads, c.head_width))(x_BTD)
        return dense(c, "out", c.model_width, axis=(-2, -1))(attend(q_BTNH, k_BSKH, v_BSKH))


class MLP(nn.Module):
    """Maps the residual stream (B, T, D) to what relu(x) ** 2 between two matmuls adds to it."""

    config: NemotronHConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        up_BTF = dense(c, "up", c.mlp_width)(RMSNorm(c, name="norm")(x_BTD))
        return dense(c, "down", c.model_width)(nn.relu(up_BTF) ** 2)


# What a letter of the pattern stands for: the name of its parameters, and its module.
MIXERS: Mapping[str, tuple[str, type[nn.Module]]] = MappingProxyType(
    {"M": ("mamba", Mamba), "*": ("attention", Attention), "-": ("mlp", MLP)}
)


# Of the checkpoints nvidia/Nemotron-H-{size}-Base-8K and nvidia/NVIDIA-Nemotron-{size}.
_52_LAYERS = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"

SIZES: Mapping[str, NemotronHConfig] = MappingProxyType(
    {
        "4B": NemotronHConfig(
            vocab_size=131_072,
            model_width=3072,
            pattern=_52_LAYERS,
            mlp_width=12_288,
            num_heads=32,
            num_kv_heads=8,
            head_width=128,
            num_mamba_heads=112,
            mamba_head_width=64,
            num_mamba_groups=8,
            state_width=128,
        ),
        "8B": NemotronHConfig(
            vocab_size=131_072,
            model_width=4096,
            pattern=_52_LAYERS,
            mlp_width=21_504,
            num_heads=32,
            num_kv_heads=8,
            head_width=128,
            num_mamba_heads=128,
            mamba_head_width=64,
            num_mamba_groups=8,
            state_width=128,
        ),
        "47B": NemotronHConfig(
            vocab_size=131_072,
            model_width=8192,
            pattern=(
                "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
                "-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
            ),
            mlp_width=30_720,
            num_heads=64,
            num_kv_heads=8,
            head_width=128,
            num_mamba_heads=256,
            mamba_head_width=64,
            num_mamba_groups=8,
            state_width=256,
        ),
        "56B": NemotronHConfig(
            vocab_size=131_072,
            model_width=8192,
            pattern="M-M-M-M*" + 9 * "-M-M-M-M-M*" + "-M-M-M-M-M-",
            mlp_width=32_768,
            num_heads=64,
            num_kv_heads=8,
            head_width=128,
            num_mamba_heads=256,
            mamba_head_width=64,
            num_mamba_groups=8,
            state_width=256,
        ),
        # arXiv 2508.14444
        "Nano-9B-v2": NemotronHConfig(
            vocab_size=131_072,
            model_width=4480,
            pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            mlp_width=15_680,
            num_heads=40,
            num_kv_heads=8,
            head_width=128,
            num_mamba_heads=128,
            mamba_head_width=80,
            num_mamba_groups=8,
            state_width=128,
        ),
        # Not published: over bytes, and small enough to learn in a minute on two CPU cores.
        "small": NemotronHConfig(
            vocab_size=256,
            model_width=256,
            pattern="M-M-M*-M-M-M*-M-",
            mlp_width=1024,
            num_heads=8,
            num_kv_heads=4,
            head_width=32,
            num_mamba_heads=16,
            mamba_head_width=32,
            num_mamba_groups=4,
            state_width=32,
            chunk_length=32,
            dtype=jnp.float32,
        ),
        "tiny": NemotronHConfig(
            vocab_size=256,
            model_width=128,
            pattern="M-M*-M-",
            mlp_width=512,
            num_heads=4,
            num_kv_heads=2,
            head_width=32,
            num_mamba_heads=8,
            mamba_head_width=32,
            num_mamba_groups=2,
            state_width=32,
            chunk_length=32,
            dtype=jnp.float32,
        ),
    }
)


class Layer(nn.Module):
    """Adds one mixer, that of a letter of the pattern, to the residual stream (B, T, D)."""

    config: NemotronHConfig
    letter: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        name, mixer = MIXERS[self.letter]
        return x_BTD + mixer(self.config, name=name)(x_BTD)


class NemotronH(nn.Module):
    """Maps tokens (B, T), integers below V, to the logits (B, T, V) of the token after each.

    With before_head, returns the factors of the logits: hidden states (B, T, D), kernel (D, V).
    """

    config: NemotronHConfig

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, *, before_head: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        c = self.config
        x_BTD = Embed(c, name="embed")(tokens_BT)
        layer = nn.remat(Layer) if c.remat else Layer
        for i, letter in enumerate(c.pattern):
            x_BTD = layer(c, letter, name=f"layers_{i}")(x_BTD)
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        kernel_DV = Head(c, name="head")()
        return (x_BTD, kernel_DV) if before_head else x_BTD @ kernel_DV.astype(c.dtype)
