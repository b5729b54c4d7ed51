"""LLaMA-2 as Hugging Face stores it (model_type "llama")."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from models.hugging_face.fixed import check_fixed
from models.hugging_face.stored import Stored, attention, gated_mlp, kernel, plain
from models.llama2 import Llama2Config

MODEL_TYPES = ("llama",)
PREFIX = ""
UNREAD = (r".*\.rotary_emb\.inv_freq",)  # computed, in early files stored
ADVICE: Mapping[str, str] = MappingProxyType({})

# What a config.json can say otherwise, and our model cannot.
FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
)


def read_config(stored: Mapping[str, Any], **types: Any) -> Llama2Config:
    """Return the config of a config.json; `types` are its dtype and param_dtype.

    Raises:
      ValueError: it describes a later LLaMA, or another model of this type.
    """
    num_heads = stored["num_attention_heads"]
    check_fixed(stored, FIXED)
    if stored.get("head_dim") is not None:
        check_fixed(stored, {"head_dim": stored["hidden_size"] // num_heads})
    return Llama2Config(
        vocab_size=stored["vocab_size"],
        model_width=stored["hidden_size"],
        mlp_width=stored["intermediate_size"],
        num_blocks=stored["num_hidden_layers"],
        num_heads=num_heads,
        # Two keys that the first files lack.
        num_kv_heads=stored.get("num_key_value_heads", num_heads),
        norm_epsilon=stored["rms_norm_eps"],
        rope_theta=stored.get("rope_theta", 10_000.0),
        **types,
    )


def write_config(config: Llama2Config) -> dict[str, Any]:
    """Return the config.json of a config."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        **FIXED,
    }


def stored_as(config: Llama2Config) -> dict[str, Stored]:
    """Return where each parameter is, by its path."""
    found = {
        "embed/embedding": plain("model.embed_tokens"),
        "norm/scale": plain("model.norm"),
        "head/kernel": kernel("lm_head"),
    }
    for i in range(config.num_blocks):
        ours, theirs = f"layers_{i}", f"model.layers.{i}"
        found |= {
            f"{ours}/attention/norm/scale": plain(f"{theirs}.input_layernorm"),
            **attention(f"{ours}/attention", f"{theirs}.self_attn"),
            f"{ours}/mlp/norm/scale": plain(f"{theirs}.post_attention_layernorm"),
            **gated_mlp(f"{ours}/mlp", f"{theirs}.mlp"),
        }
    return found
