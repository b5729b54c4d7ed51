"""Gemma 1, 2 and 3 as Hugging Face stores them.

Of Gemma 3 the larger sizes are stored together with what sees images; the text model is read.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from models.gemma import GemmaConfig
from models.hugging_face.fixed import check_fixed
from models.hugging_face.stored import Stored, attention, gated_mlp, plain

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")
PREFIX = "language_model."
# The embedding once more, and what sees images.
UNREAD = (r"lm_head\.weight", r"vision_tower\..*", r"multi_modal_projector\..*")
ADVICE: Mapping[str, str] = MappingProxyType({})
_ARCHITECTURES = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")

# What the published files of type "gemma3" leave out: the defaults of transformers.
_TEXT_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rms_norm_eps": 1e-6,
    }
)


def read_config(stored: Mapping[str, Any], **types: Any) -> GemmaConfig:
    """Return the config of a config.json; `types` are its dtype and param_dtype.

    hidden_act is not read: early files name another activation than the one trained with.

    Raises:
      ValueError: the file asks for what no Gemma of its generation has.
    """
    if stored["model_type"] == "gemma3":
        stored = {**_TEXT_DEFAULTS, **stored["text_config"], "model_type": "gemma3_text"}
    config = GemmaConfig(
        generation=MODEL_TYPES.index(stored["model_type"]) + 1,
        vocab_size=stored["vocab_size"],
        model_width=stored["hidden_size"],
        mlp_width=stored["intermediate_size"],
        num_blocks=stored["num_hidden_layers"],
        num_heads=stored["num_attention_heads"],
        num_kv_heads=stored["num_key_value_heads"],
        head_width=stored["head_dim"],
        window=stored.get("sliding_window"),
        query_pre_attn_scalar=stored.get("query_pre_attn_scalar"),
        score_soft_cap=stored.get("attn_logit_softcapping"),
        logit_soft_cap=stored.get("final_logit_softcapping"),
        rope_theta=stored["rope_theta"],
        local_rope_theta=stored.get("rope_local_base_freq"),
        rope_slower=(stored.get("rope_scaling") or {}).get("factor"),
        norm_epsilon=stored["rms_norm_eps"],
        **types,
    )
    fixed = {
        "layer_types": _layer_types(config),
        "sliding_window_pattern": 6,  # of Gemma 3, before there were layer_types
        "rope_scaling": _rope_scaling(config),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    }
    check_fixed(stored, fixed)
    return config


def write_config(config: GemmaConfig) -> dict[str, Any]:
    """Return the config.json of a config."""
    written = {
        "model_type": MODEL_TYPES[config.generation - 1],
        "architectures": [_ARCHITECTURES[config.generation - 1]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    if config.generation >= 2:
        written |= {
            "layer_types": _layer_types(config),
            "sliding_window": config.window,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
            "attn_logit_softcapping": config.score_soft_cap,
            "final_logit_softcapping": config.logit_soft_cap,
        }
    if config.generation >= 3:
        written |= {
            "rope_local_base_freq": config.local_rope_theta,
            "rope_scaling": _rope_scaling(config),
        }
    return written


def stored_as(config: GemmaConfig) -> dict[str, Stored]:
    """Return where each parameter is, by its path."""
    # Gemma 1 has no norm behind attention, and what is before its MLP is called "post_attention".
    before_mlp = "post_attention" if config.generation == 1 else "pre_feedforward"
    found = {
        "embed/embedding": plain("model.embed_tokens"),
        "norm/scale": plain("model.norm"),
    }
    for i in range(config.num_blocks):
        ours, theirs = f"layers_{i}", f"model.layers.{i}"
        found |= {
            f"{ours}/attention/norm/scale": plain(f"{theirs}.input_layernorm"),
            **attention(f"{ours}/attention", f"{theirs}.self_attn"),
            f"{ours}/mlp/norm/scale": plain(f"{theirs}.{before_mlp}_layernorm"),
            **gated_mlp(f"{ours}/mlp", f"{theirs}.mlp"),
        }
        if config.generation >= 2:
            found |= {
                f"{ours}/attention/post_norm/scale": plain(f"{theirs}.post_attention_layernorm"),
                f"{ours}/mlp/post_norm/scale": plain(f"{theirs}.post_feedforward_layernorm"),
            }
        if config.generation >= 3:
            found |= {
                f"{ours}/attention/query_norm/scale": plain(f"{theirs}.self_attn.q_norm"),
                f"{ours}/attention/key_norm/scale": plain(f"{theirs}.self_attn.k_norm"),
            }
    return found


def _layer_types(config: GemmaConfig) -> list[str]:
    local = map(config.is_local, range(config.num_blocks))
    return ["sliding_attention" if it else "full_attention" for it in local]


def _rope_scaling(config: GemmaConfig) -> dict[str, Any] | None:
    slower = config.rope_slower
    return None if slower is None else {"rope_type": "linear", "factor": slower}
