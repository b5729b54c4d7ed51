"""DeepSeek-V2-Lite and V3 (arXiv 2405.04434, 2412.19437): latent attention, mixtures of experts.

Shapes: B batch, T positions, D model width, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from models.loss import cross_entropy
from models.parts.dense import dense
from models.parts.embed import Embed
from models.parts.head import Head
from models.parts.mla import Yarn, latent_attention
from models.parts.mlp import gated_mlp
from models.parts.moe import Routed, Router, Shared
from models.parts.norm import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekConfig:
    """Widths and types of one DeepSeek: computes in dtype, stores parameters in param_dtype.

    The first num_dense_blocks have an MLP of mlp_width, the others a mixture of experts. A head
    has queries and keys of plain_width, which know no positions, and of rotary_width, and values
    of value_width; queries are compressed to query_rank (None: not), keys and values to kv_rank.
    With after_next, a further block predicts the token after the next. With remat, the backward
    has only what goes into a block, and computes the rest again.
    """

    vocab_size: int
    model_width: int
    mlp_width: int
    num_blocks: int
    num_dense_blocks: int
    num_heads: int
    query_rank: int | None
    kv_rank: int
    plain_width: int
    rotary_width: int
    value_width: int
    expert_width: int
    num_experts: int
    num_shared_experts: int
    experts_per_token: int
    scoring: Literal["softmax", "sigmoid"]
    num_groups: int = 1
    groups_per_token: int = 1
    routed_scale: float = 1.0
    norm_epsilon: float = 1e-6
    rope_theta: float = 10_000.0
    yarn: Yarn | None = None
    after_next: bool = False
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring {self.scoring!r} is unknown; use 'softmax' or 'sigmoid'")
        if not 0 <= self.num_dense_blocks <= self.num_blocks:
            raise ValueError(
                f"num_dense_blocks {self.num_dense_blocks} is not between 0 and num_blocks "
                f"{self.num_blocks}; change one of them"
            )
        if self.rotary_width % 2:
            raise ValueError(f"rotary_width {self.rotary_width} has no pairs; make it even")
        if self.value_width > self.plain_width + self.rotary_width:
            raise ValueError(
                f"values of width {self.value_width} are wider than keys of "
                f"{self.plain_width} + {self.rotary_width}; lower value_width"
            )
        if self.num_shared_experts < 1:
            raise ValueError(
                f"num_shared_experts is {self.num_shared_experts}; every token passes 1 or more"
            )
        if self.scoring == "softmax" and (self.num_groups, self.groups_per_token) != (1, 1):
            raise ValueError(
                f"scores by softmax are not limited to {self.groups_per_token} of "
                f"{self.num_groups} groups; leave both at 1, or use 'sigmoid'"
            )
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"groups_per_token {self.groups_per_token} is not between 1 and num_groups "
                f"{self.num_groups}; change one of them"
            )
        if self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups:
            raise ValueError(
                f"{self.num_experts} experts do not give {self.num_groups} groups of two or more "
                "each; make num_experts a larger multiple of num_groups"
            )
        allowed = self.num_experts // self.num_groups * self.groups_per_token
        if not 1 <= self.experts_per_token <= allowed:
            raise ValueError(
                f"a token chooses {self.experts_per_token} of {allowed} experts; make "
                f"experts_per_token 1 to {allowed}"
            )


SIZES: Mapping[str, DeepSeekConfig] = MappingProxyType(
    {
        "V2-Lite": DeepSeekConfig(
            vocab_size=102_400,
            model_width=2048,
            mlp_width=10_944,
            num_blocks=27,
            num_dense_blocks=1,
            num_heads=16,
            query_rank=None,
            kv_rank=512,
            plain_width=128,
            rotary_width=64,
            value_width=128,
            expert_width=1408,
            num_experts=64,
            num_shared_experts=2,
            experts_per_token=6,
            scoring="softmax",
            yarn=Yarn(factor=40.0, original_positions=4096, mscale=0.707),
        ),
        "V3": DeepSeekConfig(
            vocab_size=129_280,
            model_width=7168,
            mlp_width=18_432,
            num_blocks=61,
            num_dense_blocks=3,
            num_heads=128,
            query_rank=1536,
            kv_rank=512,
            plain_width=128,
            rotary_width=64,
            value_width=128,
            expert_width=2048,
            num_experts=256,
            num_shared_experts=1,
            experts_per_token=8,
            scoring="sigmoid",
            num_groups=8,
            groups_per_token=4,
            routed_scale=2.5,
            yarn=Yarn(factor=40.0, original_positions=4096),
            after_next=True,
        ),
        # Not published: over bytes, and small enough to learn in a minute on two CPU cores.
        "small": DeepSeekConfig(
            vocab_size=256,
            model_width=256,
            mlp_width=704,
            num_blocks=8,
            num_dense_blocks=1,
            num_heads=8,
            query_rank=96,
            kv_rank=64,
            plain_width=32,
            rotary_width=16,
            value_width=32,
            expert_width=176,
            num_experts=8,
            num_shared_experts=1,
            experts_per_token=2,
            scoring="sigmoid",
            num_groups=4,
            groups_per_token=2,
            after_next=True,
            dtype=jnp.float32,
        ),
        "tiny": DeepSeekConfig(
            vocab_size=256,
            model_width=128,
            mlp_width=352,
            num_blocks=4,
            num_dense_blocks=1,
            num_heads=4,
            query_rank=48,
            kv_rank=32,
            plain_width=32,
            rotary_width=16,
            value_width=32,
            expert_width=88,
            num_experts=8,
            num_shared_experts=1,
            experts_per_token=2,
            scoring="sigmoid",
            num_groups=4,
            groups_per_token=2,
            after_next=True,
            dtype=jnp.float32,
        ),
    }
)


class Attention(nn.Module):
    """Maps the residual stream (B, T, D) to what latent attention adds to it."""

    config: DeepSeekConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return latent_attention(self.config, RMSNorm(self.config, name="norm")(x_BTD))


class MLP(nn.Module):
    """Maps the residual stream (B, T, D) to what SwiGLU adds to it."""

    config: DeepSeekConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        return gated_mlp(c, RMSNorm(c, name="norm")(x_BTD), c.mlp_width)


class Experts(nn.Module):
    """Maps the residual stream (B, T, D) to what shared and routed experts add to it."""

    config: DeepSeekConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        choice_BTC, weights_BTC = Router(c, name="router")(x_BTD)
        shared_BTD = Shared(c, name="shared")(x_BTD)
        return shared_BTD + Routed(c, name="routed")(x_BTD, choice_BTC, weights_BTC)


class Block(nn.Module):
    """Attention, then the MLP or the experts, each added to the residual stream (B, T, D)."""

    config: DeepSeekConfig
    is_dense: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD += Attention(self.config, name="attention")(x_BTD)
        if self.is_dense:
            return x_BTD + MLP(self.config, name="mlp")(x_BTD)
        return x_BTD + Experts(self.config, name="experts")(x_BTD)


class DeepSeek(nn.Module):
    """Maps tokens (B, T), integers below V, to the logits (B, T, V) of the token after each.

    With before_head, returns the factors of the logits: hidden states (B, T, D), kernel (D, V).
    With after_next, returns two such results: the second, of T - 1 positions, is of the token
    after the next. Only a config with after_next has it.
    """

    config: DeepSeekConfig

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, *, before_head: bool = False, after_next: bool = False
    ) -> Any:
        c = self.config
        if after_next and not c.after_next:
            raise ValueError(
                "this config has no block that predicts the token after the next; call without "
                "after_next, or set after_next in the config"
            )
        embed = Embed(c, name="embed")
        x_BTD = embed(tokens_BT)
        block = nn.remat(Block) if c.remat else Block
        for i in range(c.num_blocks):
            x_BTD = block(c, is_dense=i < c.num_dense_blocks, name=f"layers_{i}")(x_BTD)
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        kernel_DV = Head(c, name="head")()

        def result(x_BTD: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
            return (x_BTD, kernel_DV) if before_head else x_BTD @ kernel_DV.astype(c.dtype)

        # Initialization makes its parameters whatever the call asks for.
        if not after_next and not (c.after_next and self.is_initializing()):
            return result(x_BTD)
        further = TokenAfterNext(c, name="after_next")
        x_after_BTD = further(x_BTD[:, :-1], embed(tokens_BT[:, 1:]))
        return (result(x_BTD), result(x_after_BTD)) if after_next else result(x_BTD)


class TokenAfterNext(nn.Module):
    """Predicts the token after the next with one further block (arXiv 2412.19437, section 2.2).

    Maps what the main model returns before its head (B, T, D), and the embeddings (B, T, D) of
    the tokens that follow, to what the main model's kernel (D, V) maps to the logits of the tokens
    after these. Embedding and kernel are those of the main model, so that they are not in here.
    """

    config: DeepSeekConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, next_BTD: jax.Array) -> jax.Array:
        c = self.config
        # Equation 21 has them the other way round, the published checkpoint like this.
        halves = RMSNorm(c, name="next_norm")(next_BTD), RMSNorm(c, name="hidden_norm")(x_BTD)
        x_BTD = dense(c, "join", c.model_width)(jnp.concatenate(halves, axis=-1))
        block = nn.remat(Block) if c.remat else Block
        return RMSNorm(c, name="norm")(block(c, is_dense=False, name="block")(x_BTD))


def training_loss(
    model: Callable[..., Any],
    batch: Mapping[str, jax.Array],
    *,
    balance_weight: float,
    after_next_weight: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns what DeepSeek is trained on, and next_token_loss, its first term, by itself.

    Added to it are the balance losses of all layers with experts, and the cross-entropy of the
    tokens after the next, each with its weight (arXiv 2412.19437, equations 17 and 25); that is a
    mean over the T - 1 positions that have one, where equation 24 divides by T. The biases
    of routers have no gradients but what `steer_biases` reads: wrap the optimizer in it.

    Args:
        model: `DeepSeek.apply` with parameters bound.
        batch: "tokens", integers (B, T + 1) as for next_token_loss; T is 2 or more.
        balance_weight: 0.001 for V2-Lite, 0.0001 for V3.
        after_next_weight: 0.3 for most of V3's training, then 0.1; 0 does not call the block.
    """
    tokens = batch["tokens"]
    if tokens.shape[1] < 3:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens have none after the next; use 3 or more"
        )
    after_next = after_next_weight != 0
    out, sown = model(
        tokens[:, :-1], before_head=True, after_next=after_next, mutable=["losses", "loads"]
    )
    # From the factors, so that one loss ends before the logits of the other are made.
    main, *further = (
        cross_entropy(x_BTD @ kernel_DV.astype(x_BTD.dtype), tokens[:, first:]).mean()
        for first, (x_BTD, kernel_DV) in enumerate(out if after_next else (out,), start=1)
    )
    # In the order of the layers, each of which can then add to what it is given.
    balance, loads = (
        sum(itertools.chain(*flatten_dict(sown.get(name, {})).values()))
        for name in ("losses", "loads")
    )
    loss = main + balance_weight * balance + loads
    for value in further:
        loss += after_next_weight * value
    return loss, main
