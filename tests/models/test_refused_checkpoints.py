"""What is wrong with a checkpoint is said."""

import dataclasses
import json
import math
import shutil

import jax.numpy as jnp
import pytest

from models import MODELS
from models.load import load
from models.save import save
from tests.models import small
from tests.models.checkpoints import change_config, change_tensors, random_params, rewrite

pytestmark = pytest.mark.usefixtures("lenient")


def rename(tensors):
    tensors["model.norm.gain"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].reshape(128, 64)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = embedding.astype(jnp.float8_e4m3fn)
    return tensors


def rename_layers(tensors):
    return {name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items()}


NAMES = [
    *("input_layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight"),
    *("mlp.up_proj.weight", "post_attention_layernorm.weight"),
    *(f"self_attn.{x}_proj.weight" for x in "kqvo"),
]


@pytest.mark.parametrize(
    ("spoil", "complaints"),
    [
        (shutil.rmtree, ["config.json is missing; name the folder of a checkpoint"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json is not JSON: Expecting"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json is not a JSON object"]),
        (
            change_config(model_type="bert"),
            ["has model_type bert; known are deepseek_v2, deepseek_v3, gemma, gemma2,"],
        ),
        (
            lambda f: rewrite(f / "config.json", lambda c: {"model_type": "llama"}),
            ["config.json has no 'num_attention_heads', which a llama needs"],
        ),
        (
            change_config(quantization_config={"quant_method": "fp8"}),
            [
                "config.json is of a quantized model, {'quant_method': 'fp8'}; convert it",
                "and delete quantization_config",
            ],
        ),
        (change_config(hidden_size="32"), ["config.json has hidden_size '32'; write a number"]),
        (change_config(rms_norm_eps="1e-5"), ["has rms_norm_eps '1e-5'; write a number"]),
        (change_config(rms_norm_eps=math.nan), ["has rms_norm_eps nan; write a number"]),
        (change_config(rms_norm_eps=[1]), ["norm_epsilon is [1]; write a number"]),
        (change_config(hidden_size=32.0), ["model_width is 32.0; write a whole number"]),
        (change_config(num_attention_heads=0), ["config.json: integer modulo by zero"]),
        (change_config(intermediate_size=0), ["mlp_width is 0; write a positive number"]),
        (change_config(vocab_size=-1), ["vocab_size is -1; write a positive number"]),
        (change_config(num_key_value_heads=True), ["num_kv_heads is True; write a number"]),
        (change_config(rope_scaling={"rope_type": "llama3"}), ["config.json: rope_scaling is {"]),
        (change_config(rope_parameters={"rope_theta": 5e5}), ["in their place write rope_theta"]),
        (change_config(head_dim=16), ["head_dim is 16 in the config.json; only 8 is supported"]),
        (
            lambda f: (f / "model.safetensors").unlink(),
            ["has neither model.safetensors nor model.safetensors.index.json"],
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"pickle"),
            ["model.safetensors is broken, copy it again: Error while deserializing header"],
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-1]
            ),
            ["is broken, copy it again: Error while deserializing header: incomplete metadata"],
        ),
        (
            change_tensors(rename),
            [
                "the tensors in",
                "model.norm.weight is missing",
                "nothing reads model.norm.gain",
                "lm_head.weight has shape (128, 64), but the config asks for (256, 32)",
                "model.embed_tokens.weight is stored as F8_E4M3; use one of F32, F16, BF16",
            ],
        ),
        (
            change_tensors(rename_layers),
            [
                *(f"model.layers.{i}.{name} is missing" for i in range(2) for name in NAMES),
                *(f"nothing reads model.blocks.{i}.{name}" for i in range(2) for name in NAMES),
            ],
        ),
        (change_config(num_hidden_layers=20), ["and 122 more"]),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(spoil, complaints, tmp_path):
    folder = tmp_path / "saved"
    module = MODELS["llama2"].module(small.LLAMA2)
    save(folder, module, random_params(module))
    spoil(folder)
    with pytest.raises(ValueError) as raised:
        load(folder)
    for complaint in complaints:
        assert complaint in str(raised.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"norm.weight": 1}}])
def test_an_index_of_no_files_is_refused(index, tmp_path):
    folder, module = tmp_path / "saved", MODELS["llama2"].module(small.LLAMA2)
    save(folder, module, random_params(module))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json has no weight_map from tensors to files"):
        load(folder)


@pytest.mark.parametrize("stretch", ["x", -64, 0])
def test_numbers_of_yarn_are_checked(stretch, tmp_path):
    config = dataclasses.replace(small.DEEPSEEK_V3, yarn=small.YARN)
    written = MODELS["deepseek"].hugging_face.write_config(config)
    written["rope_scaling"]["original_max_position_embeddings"] = stretch
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=f"original_positions is '?{stretch}'?; write a"):
        load(tmp_path)


def test_a_missing_shard_is_said(deep, tmp_path):
    folder = shutil.copytree(deep[0], tmp_path / "copy")
    missing = next(folder.glob("model-00002-*"))
    missing.unlink()
    with pytest.raises(ValueError, match=f"the file {missing} is missing"):
        load(folder)


def test_a_main_model_alone_is_asked_for(tmp_path):
    """As transformers writes V3, which reads no more of it."""
    module = MODELS["deepseek"].module(small.DEEPSEEK_V3)
    save(tmp_path / "saved", module, random_params(module))
    change_config(num_nextn_predict_layers=1)(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"set num_nextn_predict_layers to 0 in the config\.json"):
        load(tmp_path / "saved")
    for none in 0, None:
        change_config(num_nextn_predict_layers=none)(tmp_path / "saved")
        assert load(tmp_path / "saved").module == module
    change_config(num_nextn_predict_layers=2)(tmp_path / "saved")
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 2; write 1, as V3 has, or 0"):
        load(tmp_path / "saved")


def test_the_block_after_a_main_model_is_noticed(tmp_path):
    module = MODELS["deepseek"].module(dataclasses.replace(small.DEEPSEEK_V3, after_next=True))
    save(tmp_path / "saved", module, random_params(module))
    change_config(num_nextn_predict_layers=0)(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"set num_nextn_predict_layers to 1 in the config\.json"):
        load(tmp_path / "saved")


def test_the_first_files_of_llama_say_less(tmp_path):
    folder, module = tmp_path / "saved", MODELS["llama2"].module(small.LLAMA2)
    save(folder, module, random_params(module))
    unsaid = ("rope_theta", "num_key_value_heads", "attention_bias", "mlp_bias")
    rewrite(folder / "config.json", lambda c: {k: v for k, v in c.items() if k not in unsaid})
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \(16, 32\)"):
        load(folder)  # without groups it has as many keys as queries
    rewrite(folder / "config.json", lambda c: c | {"num_key_value_heads": 2})
    assert load(folder).module == module
