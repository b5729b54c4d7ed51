"""Nemotron-H as NVIDIA stores it on Hugging Face (model_type "nemotron_h")."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from models.hugging_face.fixed import check_fixed
from models.hugging_face.stored import Stored, kernel, plain
from models.nemotron_h import NemotronHConfig

MODEL_TYPES = ("nemotron_h",)
PREFIX = ""
UNREAD: tuple[str, ...] = ()
ADVICE: Mapping[str, str] = MappingProxyType({})

# What a config.json can say otherwise, and our model cannot.
FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "sliding_window": None,
        "time_step_limit": [0.0, math.inf],
        "tie_word_embeddings": False,
    }
)


def read_config(stored: Mapping[str, Any], **types: Any) -> NemotronHConfig:
    """Return the config of a config.json; `types` are its dtype and param_dtype.

    Raises:
      ValueError: it describes a model of this type that we do not have.
    """
    check_fixed(stored, FIXED)
    # The older checkpoints name the width of a head otherwise.
    head_key = "head_dim" if "head_dim" in stored else "attention_head_dim"
    return NemotronHConfig(
        vocab_size=stored["vocab_size"],
        model_width=stored["hidden_size"],
        pattern=stored["hybrid_override_pattern"],
        mlp_width=stored["intermediate_size"],
        num_heads=stored["num_attention_heads"],
        num_kv_heads=stored["num_key_value_heads"],
        head_width=stored[head_key],
        num_mamba_heads=stored["mamba_num_heads"],
        mamba_head_width=stored["mamba_head_dim"],
        num_mamba_groups=stored["n_groups"],
        state_width=stored["ssm_state_size"],
        convolution_width=stored["conv_kernel"],
        chunk_length=stored["chunk_size"],
        norm_epsilon=stored["layer_norm_epsilon"],
        **types,
    )


def write_config(config: NemotronHConfig) -> dict[str, Any]:
    """Return the config.json of a config."""
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "num_hidden_layers": len(config.pattern),
        "hybrid_override_pattern": config.pattern,
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "attention_head_dim": config.head_width,
        "mamba_num_heads": config.num_mamba_heads,
        "mamba_head_dim": config.mamba_head_width,
        "n_groups": config.num_mamba_groups,
        "ssm_state_size": config.state_width,
        "conv_kernel": config.convolution_width,
        "chunk_size": config.chunk_length,
        "layer_norm_epsilon": config.norm_epsilon,
        **FIXED,
    }


def stored_as(config: NemotronHConfig) -> dict[str, Stored]:
    """Return where each parameter is, by its path."""
    found = {
        "embed/embedding": plain("backbone.embeddings"),
        "norm/scale": plain("backbone.norm_f"),
        "head/kernel": kernel("lm_head"),
    }
    for i, letter in enumerate(config.pattern):
        name, parameters = _MIXERS[letter]
        norm = plain(f"backbone.layers.{i}.norm")
        found[f"layers_{i}/{name}/norm/scale"] = norm
        for ours, (theirs, num_inputs) in parameters.items():
            found[f"layers_{i}/{name}/{ours}"] = Stored(
                names=(f"backbone.layers.{i}.mixer.{theirs}",), num_inputs=num_inputs
            )
    return found


# By letter of the pattern: our name of the layer, then of each parameter theirs and num_inputs.
_MIXERS: Mapping[str, tuple[str, Mapping[str, tuple[str, int | None]]]] = {
    "M": (
        "mamba",
        {
            "in/kernel": ("in_proj.weight", 1),
            "convolution/kernel": ("conv1d.weight", None),
            "convolution/bias": ("conv1d.bias", None),
            "dt_bias": ("dt_bias", None),
            "A_log": ("A_log", None),
            "D": ("D", None),
            "gated_norm/scale": ("norm.weight", None),
            "out/kernel": ("out_proj.weight", 1),
        },
    ),
    "*": (
        "attention",
        {
            "query/kernel": ("q_proj.weight", 1),
            "key/kernel": ("k_proj.weight", 1),
            "value/kernel": ("v_proj.weight", 1),
            "out/kernel": ("o_proj.weight", 2),
        },
    ),
    "-": ("mlp", {"up/kernel": ("up_proj.weight", 1), "down/kernel": ("down_proj.weight", 1)}),
}
