"""DeepSeek-V2-Lite and V3 as Hugging Face stores them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from models.deepseek import DeepSeekConfig
from models.hugging_face.fixed import check_fixed
from models.hugging_face.stored import Stored, gated_mlp, kernel, plain
from models.parts.mla import Yarn

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
PREFIX = ""
# Copies of the main model's in the block that predicts the token after the next.
UNREAD = (r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",)
ADVICE: Mapping[str, str] = MappingProxyType(
    {
        r"model\.layers\.\d+\.eh_proj\.weight is missing": (
            "set num_nextn_predict_layers to 0 in the config.json to load the main model alone"
        ),
        r"nothing reads model\.layers\.\d+\.eh_proj\.weight": (
            "set num_nextn_predict_layers to 1 in the config.json to load what predicts the token "
            "after the next, too"
        ),
    }
)

# What a config.json can say otherwise, and our model cannot.
FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "tie_word_embeddings": False,
    }
)


def read_config(stored: Mapping[str, Any], **types: Any) -> DeepSeekConfig:
    """Return the config of a config.json; `types` are its dtype and param_dtype.

    Raises:
      ValueError: it asks for what neither V2-Lite nor V3 has, in routing or in YaRN, say.
    """
    is_v3 = stored["model_type"] == "deepseek_v3"
    scoring: Literal["softmax", "sigmoid"] = "sigmoid" if is_v3 else "softmax"
    check_fixed(stored, {**FIXED, "scoring_func": scoring})
    # The published config.json of V3 has it, one that transformers writes may not.
    method = stored.get("topk_method", "noaux_tc" if is_v3 else "greedy")
    if method != ("noaux_tc" if is_v3 else "greedy") or stored["norm_topk_prob"] != is_v3:
        raise ValueError(
            f"experts of a {stored['model_type']} chosen by {method!r}, with norm_topk_prob "
            f"{stored['norm_topk_prob']}, are not supported; V2-Lite has 'greedy' and false, V3 "
            "'noaux_tc' and true"
        )
    num_after_next = stored.get("num_nextn_predict_layers", 0)
    if num_after_next > 1:
        raise ValueError(
            f"num_nextn_predict_layers is {num_after_next}; write 1, as V3 has, or 0 for the main "
            "model alone"
        )
    return DeepSeekConfig(
        vocab_size=stored["vocab_size"],
        model_width=stored["hidden_size"],
        mlp_width=stored["intermediate_size"],
        num_blocks=stored["num_hidden_layers"],
        num_dense_blocks=stored["first_k_dense_replace"],
        num_heads=stored["num_attention_heads"],
        query_rank=stored.get("q_lora_rank"),
        kv_rank=stored["kv_lora_rank"],
        plain_width=stored["qk_nope_head_dim"],
        rotary_width=stored["qk_rope_head_dim"],
        value_width=stored["v_head_dim"],
        expert_width=stored["moe_intermediate_size"],
        num_experts=stored["n_routed_experts"],
        num_shared_experts=stored["n_shared_experts"],
        experts_per_token=stored["num_experts_per_tok"],
        scoring=scoring,
        num_groups=stored["n_group"] if is_v3 else 1,
        groups_per_token=stored["topk_group"] if is_v3 else 1,
        routed_scale=stored["routed_scaling_factor"],
        norm_epsilon=stored["rms_norm_eps"],
        rope_theta=stored["rope_theta"],
        yarn=_read_yarn(stored.get("rope_scaling")),
        after_next=num_after_next > 0,
        **types,
    )


def _read_yarn(stored: Mapping[str, Any] | None) -> Yarn | None:
    if stored is None:
        return None
    kind = stored.get("type", stored.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"rotary positions scaled by {kind!r} are not supported; use 'yarn'")
    check_fixed(stored, {"attention_factor": None, "truncate": True})
    # With two different ones, queries and keys would change in length where they are turned.
    if stored.get("mscale") != stored.get("mscale_all_dim"):
        raise ValueError(
            f"YaRN with mscale {stored.get('mscale')} and mscale_all_dim "
            f"{stored.get('mscale_all_dim')} is not supported; they have to be equal"
        )
    return Yarn(
        factor=float(stored["factor"]),
        original_positions=stored["original_max_position_embeddings"],
        fast_turns=float(stored["beta_fast"]),
        slow_turns=float(stored["beta_slow"]),
        mscale=stored["mscale"],
    )


def write_config(config: DeepSeekConfig) -> dict[str, Any]:
    """Return the config.json of a config."""
    is_v3 = config.scoring == "sigmoid"
    written: dict[str, Any] = {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_blocks,
        "num_nextn_predict_layers": int(config.after_next),
        "first_k_dense_replace": config.num_dense_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.query_rank,
        "kv_lora_rank": config.kv_rank,
        "qk_nope_head_dim": config.plain_width,
        "qk_rope_head_dim": config.rotary_width,
        "v_head_dim": config.value_width,
        "moe_intermediate_size": config.expert_width,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.num_shared_experts,
        "num_experts_per_tok": config.experts_per_token,
        "scoring_func": config.scoring,
        "topk_method": "noaux_tc" if is_v3 else "greedy",
        "norm_topk_prob": is_v3,
        "n_group": config.num_groups,
        "topk_group": config.groups_per_token,
        "routed_scaling_factor": config.routed_scale,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        **FIXED,
    }
    if config.yarn is not None:
        written["rope_scaling"] = {
            "type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_positions,
            "beta_fast": config.yarn.fast_turns,
            "beta_slow": config.yarn.slow_turns,
            "mscale": config.yarn.mscale,
            "mscale_all_dim": config.yarn.mscale,
        }
        written["max_position_embeddings"] = int(
            config.yarn.factor * config.yarn.original_positions
        )
    return written


def stored_as(config: DeepSeekConfig) -> dict[str, Stored]:
    """Return where each parameter is, by its path."""
    after_next = f"model.layers.{config.num_blocks}"
    embed_copies, head_copies = (
        (f"{after_next}.{name}",) if config.after_next else ()
        for name in ("embed_tokens", "shared_head.head")
    )
    found = {
        "embed/embedding": plain("model.embed_tokens", copies=embed_copies),
        "norm/scale": plain("model.norm"),
        "head/kernel": kernel("lm_head", copies=head_copies),
    }
    if config.after_next:
        found |= _block(config, "after_next/block", after_next, is_dense=False)
        found["after_next/join/kernel"] = kernel(f"{after_next}.eh_proj")
        for ours, theirs in _NORMS_AFTER_NEXT.items():
            found[f"after_next/{ours}/scale"] = plain(f"{after_next}.{theirs}")
    for i in range(config.num_blocks):
        is_dense = i < config.num_dense_blocks
        found |= _block(config, f"layers_{i}", f"model.layers.{i}", is_dense=is_dense)
    return found


# Of the block that predicts the token after the next: our names and theirs.
_NORMS_AFTER_NEXT: Mapping[str, str] = MappingProxyType(
    {"next_norm": "enorm", "hidden_norm": "hnorm", "norm": "shared_head.norm"}
)


def _block(config: DeepSeekConfig, ours: str, theirs: str, *, is_dense: bool) -> dict[str, Stored]:
    kind = "mlp" if is_dense else "experts"
    norm = plain(f"{theirs}.post_attention_layernorm")
    found = _attention(config, f"{ours}/attention", theirs) | {f"{ours}/{kind}/norm/scale": norm}
    if is_dense:
        return found | gated_mlp(f"{ours}/mlp", f"{theirs}.mlp")
    return found | _experts(config, f"{ours}/experts", f"{theirs}.mlp")


def _attention(config: DeepSeekConfig, ours: str, block: str) -> dict[str, Stored]:
    theirs = f"{block}.self_attn"
    found = {
        f"{ours}/norm/scale": plain(f"{block}.input_layernorm"),
        f"{ours}/kv_down/kernel": kernel(f"{theirs}.kv_a_proj_with_mqa"),
        f"{ours}/kv_norm/scale": plain(f"{theirs}.kv_a_layernorm"),
        f"{ours}/kv_up/kernel": kernel(f"{theirs}.kv_b_proj"),
        f"{ours}/out/kernel": kernel(f"{theirs}.o_proj", num_inputs=2),
    }
    if config.query_rank is None:
        return found | {f"{ours}/query/kernel": kernel(f"{theirs}.q_proj")}
    return found | {
        f"{ours}/query_down/kernel": kernel(f"{theirs}.q_a_proj"),
        f"{ours}/query_norm/scale": plain(f"{theirs}.q_a_layernorm"),
        f"{ours}/query_up/kernel": kernel(f"{theirs}.q_b_proj"),
    }


def _experts(config: DeepSeekConfig, ours: str, theirs: str) -> dict[str, Stored]:
    found = gated_mlp(f"{ours}/shared", f"{theirs}.shared_experts")
    found[f"{ours}/router/kernel"] = kernel(f"{theirs}.gate")
    if config.scoring == "sigmoid":
        found[f"{ours}/router/bias"] = Stored(names=(f"{theirs}.gate.e_score_correction_bias",))
    for part in ("gate", "up", "down"):
        names = [f"{theirs}.experts.{e}.{part}_proj" for e in range(config.num_experts)]
        found[f"{ours}/routed/{part}"] = kernel(*names)
    return found
