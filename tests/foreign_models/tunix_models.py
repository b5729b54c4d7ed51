"""Models of tunix, in nnx: no path names an equation. Each says what it asks of a front end."""

import jax.numpy as jnp
from flax import nnx

from tests.foreign_models.foreign_model import (
    HEAD_WIDTH,
    MLP_WIDTH,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KV_HEADS,
    B,
    D,
    ForeignModel,
    T,
    V,
    cross_entropy,
    layers,
    package,
)

_SIZES = {
    "num_layers": NUM_BLOCKS,
    "embed_dim": D,
    "hidden_dim": MLP_WIDTH,
    "num_heads": NUM_HEADS,
    "head_dim": HEAD_WIDTH,
    "num_kv_heads": NUM_KV_HEADS,
}
_ROTARY_AND_NORM = {"rope_theta": 10_000, "norm_eps": 1e-6}
_EMBEDDING = "embedder/input_embedding"
_ATTENTION_AND_MLP = ("layers/{}/attn", "layers/{}/mlp")


def qwen3_moe():
    """A router, then experts one after the other, with narrower places between them: one layer.

    Masks and rotary angles are made from positions, in every attention that reads them.
    """
    module = package("tunix.models.qwen3.model")
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    config = module.ModelConfig(vocab_size=V, **experts, **_SIZES, **_ROTARY_AND_NORM)
    return _model(
        lambda: module.Qwen3(config, rngs=nnx.Rngs(0)),
        layers=layers(_EMBEDDING, _ATTENTION_AND_MLP, "lm_head/w"),
    )


def llama3_remat():
    """Each block is one remat, which closes over its part of the model."""
    module = package("tunix.models.llama3.model")
    config = module.ModelConfig(
        vocab_size=V,
        weight_tying=True,
        remat_config=module.RematConfig.DECODER,
        **_SIZES,
        **_ROTARY_AND_NORM,
    )
    return _model(
        lambda: module.Llama3(config, rngs=nnx.Rngs(0)),
        layers=layers(_EMBEDDING, ("layers/{}",), f"{_EMBEDDING}#2"),
        tied=_EMBEDDING,
    )


def gemma2():
    """Local and global attention take turns; a cap on the logits is behind the tied head."""
    module = package("tunix.models.gemma.model")
    kinds = module.AttentionType
    config = module.ModelConfig(
        num_embed=V,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=T // 2,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attn_logits_soft_cap=50.0,
        final_logit_softcap=30.0,
        remat_config=module.RematConfig.BLOCK,  # attention and MLP apart
        **_SIZES,
    )
    return _model(
        lambda: module.Gemma(config, rngs=nnx.Rngs(0)),
        layers=layers(_EMBEDDING, _ATTENTION_AND_MLP, f"{_EMBEDDING}#2"),
        tied=_EMBEDDING,
    )


def gemma3():
    """The embedding is also the head."""
    module = package("tunix.models.gemma3.model")
    config = module.ModelConfig(
        num_embed=V, sliding_window_size=T // 2, param_dtype=jnp.float32, **_SIZES
    )
    return _model(
        lambda: module.Gemma3(config, rngs=nnx.Rngs(0)),
        layers=layers(_EMBEDDING, _ATTENTION_AND_MLP, f"{_EMBEDDING}#2"),
        tied=_EMBEDDING,
    )


def gemma4():
    """Its later layers read the keys and values of the last of the earlier ones."""
    module = package("tunix.models.gemma4.model")
    config = module.ModelConfig(
        num_embed=V,
        global_key_size=HEAD_WIDTH,
        attention_pattern=(module.AttentionType.GLOBAL,),
        frac_shared_layers=0.5,
        **{**_SIZES, "num_layers": 4},
    )
    blocks = (
        *("layers/0/attn", "layers/0/mlp"),
        "layers/1",  # where the keys begin to pass by, nothing says yet that they will
        *("layers/2/attn", "layers/2/mlp"),
        *("layers/3/attn", "layers/3/mlp"),
    )
    keys_or_values = (3, (4, 6), (B, T, NUM_KV_HEADS, HEAD_WIDTH))
    return _model(
        lambda: module.Gemma4(config, rngs=nnx.Rngs(0)),
        layers=(_EMBEDDING, *blocks, f"{_EMBEDDING}#2"),
        tied=_EMBEDDING,
        passing=(keys_or_values, keys_or_values),
        # Keys and values of those that read others'; and a norm follows the last scale.
        without_gradient=(
            *(
                f"layers/{i}/attn/{name}"
                for i in (2, 3)
                for name in ("_key_norm/scale", "kv_einsum/w")
            ),
            "layers/3/skip_scale",
        ),
    )


def _model(make, **facts):
    structure, params = nnx.split(nnx.jit(make)())

    def module_loss(module, batch):
        ids_BT = batch["ids"]
        positions_BT = jnp.broadcast_to(jnp.arange(T), ids_BT.shape)
        mask_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (*ids_BT.shape, T))
        logits_BTV, _ = module(ids_BT, positions_BT, None, mask_BTT)
        return cross_entropy(logits_BTV, ids_BT)

    def loss(params, batch):
        return module_loss(nnx.merge(structure, params), batch)

    return ForeignModel(
        loss=loss, params=params, structure=structure, module_loss=module_loss, **facts
    )
