"""A mixture of shared and routed experts (DeepSeekMoE, arXiv 2401.06066, section 3).

Shapes: B batch, T positions, D model width, F hidden width of an expert, E routed experts,
C experts chosen for a token, G groups of experts, L groups chosen for a token, X = E / G experts
of a group, A = B * T * C assignments of a token to an expert, S places for these (see arrange).
"""

import functools
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from models.parts.dense import Types
from models.parts.grouped_dot import arrange, grouped_dot
from models.parts.mlp import gated_mlp


class MixtureConfig(Types, Protocol):
    """How many experts there are, how wide, and how tokens choose them (see Router)."""

    @property
    def expert_width(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def num_shared_experts(self) -> int: ...

    @property
    def experts_per_token(self) -> int: ...

    @property
    def scoring(self) -> Literal["softmax", "sigmoid"]: ...

    @property
    def num_groups(self) -> int: ...

    @property
    def groups_per_token(self) -> int: ...

    @property
    def routed_scale(self) -> float: ...


class Routed(nn.Module):
    """Maps (B, T, D) and what every token chose, with which weights, to the sum (B, T, D)."""

    config: MixtureConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, choice_BTC: jax.Array, weights_BTC: jax.Array
    ) -> jax.Array:
        width = x_BTD.shape[-1]
        return apply_experts(
            x_BTD,
            choice_BTC,
            weights_BTC,
            self._stacked("gate", width, self.config.expert_width),
            self._stacked("up", width, self.config.expert_width),
            self._stacked("down", self.config.expert_width, width),
        )

    def _stacked(self, name: str, *shape: int) -> jax.Array:
        c = self.config
        initial = nn.initializers.lecun_normal(batch_axis=0)
        return self.param(name, initial, (c.num_experts, *shape), c.param_dtype).astype(c.dtype)


class Shared(nn.Module):
    """The experts that every token passes: side by side they are one gated MLP."""

    config: MixtureConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        return gated_mlp(c, x_BTD, c.num_shared_experts * c.expert_width)


class Router(nn.Module):
    """Chooses experts (B, T, C) for every token, and their weights in float32, from (B, T, D).

    "softmax": the best scores are the weights (DeepSeek-V2, arXiv 2405.04434, equations 20 to 22,
    without limits to devices, as in V2-Lite). "sigmoid": a bias has a say in the choice, which is
    limited to the best groups, but not in the weights, which are scores that sum to one
    (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16). No gradient reaches the bias.
    Both are multiplied by routed_scale.

    Sows "balance", balance_loss, into "losses" if these are mutable; and with a bias "excess" into
    "loads", which is 0 and whose gradient is what steer_biases reads.
    """

    config: MixtureConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        shape = (x_BTD.shape[-1], c.num_experts)
        kernel_DE = self.param("kernel", nn.initializers.lecun_normal(), shape, c.param_dtype)
        logits_BTE = x_BTD.astype(jnp.float32) @ kernel_DE.astype(jnp.float32)
        if c.scoring == "softmax":
            scores_BTE = jax.nn.softmax(logits_BTE)
            choice_BTC = jax.lax.top_k(scores_BTE, c.experts_per_token)[1]
            weights_BTC = jnp.take_along_axis(scores_BTE, choice_BTC, axis=-1)
        else:
            scores_BTE = jax.nn.sigmoid(logits_BTE)
            # In float32 whatever the others are: it steps by less than bfloat16 resolves.
            bias_E = self.param("bias", nn.initializers.zeros, (c.num_experts,), jnp.float32)
            choice_BTC = _choose_in_groups(c, scores_BTE + bias_E)
            weights_BTC = jnp.take_along_axis(scores_BTE, choice_BTC, axis=-1)
            weights_BTC /= weights_BTC.sum(axis=-1, keepdims=True)
            if self.is_mutable_collection("loads") and not self.is_initializing():
                self.sow("loads", "excess", _excess_load(choice_BTC, bias_E))
        # Initialization makes every collection mutable, and should return parameters only.
        if self.is_mutable_collection("losses") and not self.is_initializing():
            self.sow("losses", "balance", balance_loss(scores_BTE, c.experts_per_token))
        return choice_BTC, weights_BTC * c.routed_scale


def _choose_in_groups(config: MixtureConfig, scores_BTE: jax.Array) -> jax.Array:
    """Return the best experts (B, T, C) of the groups whose two best have the largest sums."""
    c = config
    scores_BTE = jax.lax.stop_gradient(scores_BTE)
    scores_BTGX = scores_BTE.reshape(*scores_BTE.shape[:2], c.num_groups, -1)
    group_scores_BTG = jax.lax.top_k(scores_BTGX, 2)[0].sum(axis=-1)
    groups_BTL = jax.lax.top_k(group_scores_BTG, c.groups_per_token)[1]
    chosen_BTG = (groups_BTL[..., None] == jnp.arange(c.num_groups)).any(axis=-2)
    # Not 0, which is above the score of an expert with a bias far below 0.
    scores_BTGX = jnp.where(chosen_BTG[..., None], scores_BTGX, -jnp.inf)
    return jax.lax.top_k(scores_BTGX.reshape(scores_BTE.shape), c.experts_per_token)[1]


def _excess_load(choice_BTC: jax.Array, bias_E: jax.Array) -> jax.Array:
    """Returns 0, with a gradient (E,) in proportion to the choices beyond an even share.

    Whole numbers over a power of two, so that those of microbatches add up to 0 where it is even.
    """
    num_experts = bias_E.shape[0]
    counts_E = jnp.bincount(choice_BTC.reshape(-1), length=num_experts)
    excess_E = (counts_E * num_experts - choice_BTC.size).astype(jnp.float32)
    excess_E /= 2.0 ** math.ceil(math.log2(num_experts * choice_BTC.size))
    return (excess_E * (bias_E - jax.lax.stop_gradient(bias_E))).sum()


def steer_biases(
    optimizer: optax.GradientTransformation, speed: float = 1e-3
) -> optax.GradientTransformation:
    """Returns an optimizer that steps the biases of routers by `speed` against their loads.

    Those of overloaded experts fall, the others rise (DeepSeek-V3, arXiv 2412.19437, section
    2.1.2). All other parameters are left to `optimizer`.
    """

    def label(path: tuple[Any, ...], _: Any) -> str:
        is_bias = jax.tree_util.keystr(path, simple=True, separator="/").endswith("router/bias")
        return "bias" if is_bias else "other"

    return optax.partition(
        {"bias": optax.sign_sgd(speed), "other": optimizer},
        functools.partial(jax.tree_util.tree_map_with_path, label),
    )


def apply_experts(
    x_BTD: jax.Array,
    choice_BTC: jax.Array,
    weights_BTC: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """Returns the weighted sum (B, T, D) of the chosen experts of every token, each a SwiGLU.

    Assignments are arranged by expert, so that every expert multiplies consecutive rows and no
    token is dropped, however uneven the choice.
    """
    num_experts, num_chosen = gate_EDF.shape[0], choice_BTC.shape[-1]
    places = arrange(choice_BTC.reshape(-1), num_experts)
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    x_SD = x_SD.at[places.row_S // num_chosen].get(mode="fill", fill_value=0)
    gate_SF = grouped_dot(x_SD, gate_EDF, places.sizes_E)
    up_SF = grouped_dot(x_SD, up_EDF, places.sizes_E)
    y_SD = grouped_dot(nn.silu(gate_SF) * up_SF, down_EFD, places.sizes_E)
    y_AD = y_SD.at[places.place_A].get(unique_indices=True)
    y_BTCD = y_AD.reshape(*choice_BTC.shape, -1).astype(jnp.float32)
    return (y_BTCD * weights_BTC[..., None]).sum(axis=-2).astype(x_BTD.dtype)


def balance_loss(scores_BTE: jax.Array, experts_per_token: int) -> jax.Array:
    """Returns how unevenly the experts of a sequence are used, 1 if evenly; mean over sequences.

    The sum over experts of f * P: f is E / C times the share of tokens with this expert among
    their C best scores, P the mean of its scores, which are divided by their sum for each token.
    DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, equations 17 to 20); for scores by softmax
    also DeepSeek-V2's expert-level loss (arXiv 2405.04434, equations 23 to 25). Both without
    their factor alpha.
    """
    num_experts = scores_BTE.shape[-1]
    best_BTC = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), experts_per_token)[1]
    used_BTE = (best_BTC[..., None] == jnp.arange(num_experts)).any(axis=-2)
    f_BE = used_BTE.mean(axis=1, dtype=jnp.float32) * (num_experts / experts_per_token)
    P_BE = (scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)).mean(axis=1)
    return (f_BE * P_BE).sum(axis=-1).mean()
