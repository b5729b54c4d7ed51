"""Small configs of every family, and the same models in transformers, with every tensor random."""

import dataclasses
import warnings
from typing import Any

import jax.numpy as jnp
import pytest

from models import MODELS
from models.deepseek import SIZES as DEEPSEEK_SIZES
from models.gemma import GemmaConfig
from models.llama2 import SIZES as LLAMA2_SIZES
from models.nemotron_h import SIZES as NEMOTRON_H_SIZES
from models.parts.mla import Yarn

LLAMA2 = dataclasses.replace(LLAMA2_SIZES["tiny"], model_width=32, mlp_width=48, num_blocks=2)

# Of Gemma one of each generation. The heads are wider than their share of the model, the window is
# shorter than the tokens, the caps are low enough to bend, and Gemma 3 has a global block.
_GEMMA: dict[str, Any] = {
    "vocab_size": 97,
    "model_width": 24,
    "mlp_width": 36,
    "num_heads": 4,
    "head_width": 10,
    "dtype": jnp.float32,
}
GEMMA = {
    1: GemmaConfig(**_GEMMA, generation=1, num_blocks=2, num_kv_heads=1),
    2: GemmaConfig(
        **_GEMMA,
        generation=2,
        num_blocks=3,
        num_kv_heads=2,
        window=5,
        query_pre_attn_scalar=6,
        score_soft_cap=2.0,
        logit_soft_cap=3.0,
    ),
    3: GemmaConfig(
        **_GEMMA,
        generation=3,
        num_blocks=7,
        num_kv_heads=2,
        window=5,
        query_pre_attn_scalar=6,
        rope_theta=1_000.0,
        local_rope_theta=100.0,
        rope_slower=8.0,
    ),
}

DEEPSEEK_V3 = dataclasses.replace(
    DEEPSEEK_SIZES["tiny"],
    model_width=32,
    mlp_width=48,
    num_blocks=3,
    query_rank=24,
    kv_rank=16,
    plain_width=12,
    rotary_width=8,
    value_width=10,
    expert_width=20,
    routed_scale=2.5,
    after_next=False,
)
DEEPSEEK_V2 = dataclasses.replace(
    DEEPSEEK_V3,
    query_rank=None,
    num_shared_experts=2,
    experts_per_token=3,
    scoring="softmax",
    num_groups=1,
    groups_per_token=1,
    routed_scale=1.5,
)
# Of the four pairs one stays as it is, one is slowed down by half of the factor, two by all of it.
YARN = Yarn(factor=4.0, original_positions=64, mscale=0.707)

NEMOTRON_H = dataclasses.replace(
    NEMOTRON_H_SIZES["tiny"],
    model_width=32,
    pattern="M-*M",
    mlp_width=48,
    head_width=12,
    num_mamba_heads=4,
    mamba_head_width=6,
    state_width=8,
    chunk_length=5,
)

# Those that transformers has, with the name of their model.
REFERENCED = {
    "LLaMA-2": ("llama2", LLAMA2),
    "Gemma 1": ("gemma", GEMMA[1]),
    "Gemma 2": ("gemma", GEMMA[2]),
    "Gemma 3": ("gemma", GEMMA[3]),
    "DeepSeek-V2": ("deepseek", DEEPSEEK_V2),
    "DeepSeek-V2 with YaRN": ("deepseek", dataclasses.replace(DEEPSEEK_V2, yarn=YARN)),
    "DeepSeek-V3": ("deepseek", DEEPSEEK_V3),
    "DeepSeek-V3 with YaRN": ("deepseek", dataclasses.replace(DEEPSEEK_V3, yarn=YARN)),
}

with_transformers = pytest.mark.filterwarnings("ignore")  # which warns of its own future


def import_transformers():
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip("torch")
        return pytest.importorskip("transformers")


def make_reference(name, config):
    """The PyTorch model that transformers makes of our config.json."""
    transformers = import_transformers()
    written = MODELS[name].hugging_face.write_config(config)
    written.pop("layer_types", None)  # transformers itself shall say which blocks are local
    described = transformers.AutoConfig.for_model(**written)
    return transformers.AutoModelForCausalLM.from_config(
        described, attn_implementation="eager"
    ).eval()


def random_reference(name, config):
    """The same with every tensor random."""
    reference = make_reference(name, config)
    import torch

    generator = torch.Generator().manual_seed(0)
    for tensor_name, tensor in reference.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in tensor_name:
            tensor.copy_(1 + 0.1 * noise)
        elif "bias" in tensor_name:
            # Not negative: transformers gives experts outside the chosen groups the score 0,
            # where the published code has minus infinity.
            tensor.copy_(0.2 * noise.abs())
        else:
            tensor.copy_(0.3 * noise)
    return reference


def reference_logits(reference, config, tokens_BT, real_BT):
    """The logits (B, T, V) of a model of transformers, where some positions are padding."""
    import torch

    if getattr(config, "scoring", None) == "softmax" and config.yarn is not None:
        # The published code of V2 sharpens the softmax as that of V3 does; transformers' does not.
        for layer in reference.model.layers:
            attention = layer.self_attn
            attention.scaling = attention.qk_head_dim**-0.5 * config.yarn.score_scale
    with torch.no_grad():
        mask = torch.from_numpy(real_BT)
        return reference(torch.from_numpy(tokens_BT), attention_mask=mask).logits.numpy()
