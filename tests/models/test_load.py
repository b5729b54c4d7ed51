"""Checkpoints of Hugging Face: read, trained from, and written back."""

import dataclasses
import functools
import gc
import json
import math
import shutil
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import jaxptis
from models import MODELS, next_token_loss
from models.hugging_face.safetensors import find_tensors
from models.load import load, parameter_types
from models.save import save
from tests.models import small
from tests.noted import Noted

pytestmark = pytest.mark.usefixtures("lenient", "compiled_quickly")

TOKENS_BT = np.random.default_rng(0).integers(0, 97, size=(2, 13)).astype(np.int32)
REAL_BT = np.arange(13) < np.array([[13], [9]])  # the second sequence is padded
SHARD_BYTES = 20_000


def random_params(module, dtype=np.float32):
    rng = np.random.default_rng(1)
    flat = {
        path: (rng.normal(scale=0.3, size=each.shape) + (len(each.shape) == 1)).astype(dtype)
        for path, each in parameter_types(module).items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def read(params):
    return jax.tree.map(np.asarray, params)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.asarray(a).dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@small.with_transformers
@pytest.mark.parametrize("case", small.REFERENCED)
def test_a_model_of_transformers_comes_and_goes_back(case, tmp_path):
    name, config = small.REFERENCED[case]
    reference = small.random_reference(name, config)
    theirs, whole, ours = tmp_path / "theirs", tmp_path / "whole", tmp_path / "ours"
    reference.save_pretrained(theirs, max_shard_size=SHARD_BYTES)
    reference.save_pretrained(whole)
    assert len(files(theirs)) > 4 and "model.safetensors" in files(whole)

    loaded = load(theirs)
    assert loaded.module == MODELS[name].module(config)
    params = read(loaded.params)
    assert_equal(read(load(whole).params), params)
    tokens_BT = np.where(REAL_BT, TOKENS_BT, 0)
    expected_BTV = small.reference_logits(reference, config, tokens_BT, REAL_BT)
    logits_BTV = np.asarray(jax.jit(loaded.module.apply)({"params": params}, tokens_BT))
    assert np.abs(expected_BTV).max() > 1
    # The same float32 sums in another order.
    np.testing.assert_allclose(logits_BTV[REAL_BT], expected_BTV[REAL_BT], rtol=1e-4, atol=1e-4)

    save(ours, loaded.module, params, shard_bytes=SHARD_BYTES)
    assert len(files(ours)) > 4
    transformers = small.import_transformers()
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        ours, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())  # nothing missing, unexpected or of another shape
    for tensor_name, tensor in back.state_dict().items():
        np.testing.assert_array_equal(tensor, reference.state_dict()[tensor_name])
    # From equal tensors, which lie elsewhere in memory: the sums may be in another order.
    logits_BTV = small.reference_logits(back, config, tokens_BT, REAL_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5)


def test_nemotron_h_comes_back(tmp_path):
    """Of it transformers has the mixer only, with which test_nemotron_h compares."""
    module = MODELS["nemotron_h"].module(small.NEMOTRON_H)
    params = random_params(module)
    save(tmp_path / "saved", module, params, shard_bytes=SHARD_BYTES)
    loaded = load(tmp_path / "saved")
    assert loaded.module == module
    assert_equal(read(loaded.params), params)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    # As in the index of NVIDIA's checkpoints.
    mixers = {
        "M": (
            *("A_log", "D", "dt_bias", "conv1d.bias", "conv1d.weight"),
            *("in_proj.weight", "norm.weight", "out_proj.weight"),
        ),
        "-": ("down_proj.weight", "up_proj.weight"),
        "*": tuple(f"{x}_proj.weight" for x in "koqv"),
    }
    assert set(index["weight_map"]) == {
        *("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"),
        *(f"backbone.layers.{i}.norm.weight" for i in range(4)),
        *(f"backbone.layers.{i}.mixer.{x}" for i, m in enumerate("M-*M") for x in mixers[m]),
    }
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))


def test_the_token_after_the_next_comes_back(tmp_path):
    """Transformers does without it."""
    module = MODELS["deepseek"].module(dataclasses.replace(small.DEEPSEEK_V3, after_next=True))
    params = random_params(module)
    save(tmp_path / "saved", module, params)
    loaded = load(tmp_path / "saved")
    assert loaded.module == module
    assert_equal(read(loaded.params), params)
    found = find_tensors(tmp_path / "saved" / "model.safetensors")
    further = {name for name in found if name.startswith("model.layers.3.")}
    beside = {name.replace(".layers.2.", ".layers.3.") for name in found if ".layers.2." in name}
    # As in the index of V3, whose main model has the layers up to the 60th.
    assert further == beside | {
        f"model.layers.3.{name}.weight"
        for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm")
    } | {"model.layers.3.shared_head.head.weight"}
    for copy, original in ("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head"):
        np.testing.assert_array_equal(
            found[f"model.layers.3.{copy}.weight"].read(), found[f"{original}.weight"].read()
        )


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_values_are_rounded_as_numpy_rounds(stored, wanted, tmp_path):
    module = MODELS["llama2"].module(small.LLAMA2)
    params = random_params(module, jnp.dtype(stored))
    save(tmp_path / "saved", module, params)
    assert files(tmp_path / "saved") == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == stored
    loaded = load(tmp_path / "saved", dtype=jnp.bfloat16, param_dtype=wanted)
    assert loaded.module.config == dataclasses.replace(
        small.LLAMA2, dtype=jnp.bfloat16, param_dtype=wanted
    )
    assert_equal(read(loaded.params), jax.tree.map(lambda x: x.astype(wanted), params))


# A model whose leaves are small beside the whole.
DEEP = dataclasses.replace(
    small.LLAMA2, vocab_size=256, model_width=64, mlp_width=8192, num_blocks=6
)
LARGEST = 64 * 8192 * 4  # bytes, of a leaf
SHARD = 5 * LARGEST


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A checkpoint of DEEP, its module and its parameters."""
    folder = tmp_path_factory.mktemp("deep") / "saved"
    module = MODELS["llama2"].module(DEEP)
    params = random_params(module)
    save(folder, module, params, shard_bytes=SHARD)
    return folder, module, params


def make_trainer(module, **options):
    pipeline = jaxptis.pipeline(
        num_microbatches=2, devices=jax.devices()[:2], **{"strategy": "1f1b", **options}
    )
    return pipeline(type(module))(module.config).trainer(
        loss=next_token_loss, optimizer=optax.adam(1e-2)
    )


def batch(seed):
    tokens = np.random.default_rng(seed).integers(0, 256, size=(4, 9)).astype(np.int32)
    return {"tokens": tokens}


def transient_bytes(function, *args):
    """What NumPy and Python allocate at most in a call beyond what is left of it; its result.

    CPU devices take some arrays over as they are, which are left then.
    """
    tracemalloc.start()
    try:
        result = function(*args)
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        return peak - tracemalloc.get_traced_memory()[0], result
    finally:
        tracemalloc.stop()


def test_training_from_a_checkpoint_equals_training_from_its_values(deep, tmp_path):
    folder, module, params = deep
    trainer, seen = make_trainer(module, head_slices=2), []
    noted = {
        path: Noted(leaf, path, seen)
        for path, leaf in traverse_util.flatten_dict(load(folder).params, sep="/").items()
    }
    lazy = trainer.init_from(traverse_util.unflatten_dict(noted, sep="/"), batch(0))
    assert sorted(seen) == sorted(noted)  # each is read once
    plain = trainer.init_from(params, batch(0))
    assert_equal(jaxptis.whole(lazy.params), params)
    # The head is cut between the devices, and its leaf in the file on the host.
    assert isinstance(lazy.params["head"]["kernel"], jaxptis.Parts)
    for step in range(2):
        lazy, plain = (trainer.step(state, batch(step))[0] for state in (lazy, plain))
    assert_equal(jaxptis.whole(lazy.params), jaxptis.whole(plain.params))
    save(tmp_path / "trained", module, lazy.params)
    assert_equal(read(load(tmp_path / "trained").params), jaxptis.whole(plain.params))


def test_the_host_holds_one_leaf_at_a_time(deep, tmp_path):
    folder, module, params = deep
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    trainer = make_trainer(module)
    loaded = load(folder)
    trainer.init_from(loaded.params, batch(0))  # compiles, which takes memory of its own
    peak, state = transient_bytes(trainer.init_from, loaded.params, batch(0))
    # As it is stored and as a parameter.
    assert peak < 2.5 * LARGEST < total / 5
    for what in state.params, loaded.params:
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        peak, _ = transient_bytes(
            functools.partial(save, shard_bytes=SHARD), tmp_path / "saved", module, what
        )
        # The tensors of a file, their bytes, and the leaves that these are from.
        assert peak < 2.5 * SHARD < total
        assert_equal(read(load(tmp_path / "saved").params), params)


def rewrite(file, change):
    """Change what a JSON file says."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def change_config(**values):
    return lambda folder: rewrite(folder / "config.json", lambda config: config | values)


def change_tensors(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file)

    return spoil


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


def test_the_index_says_in_which_file_a_tensor_is(deep, tmp_path):
    """Another file may have one of that name, left over when a checkpoint was cut anew."""
    folder, _, params = deep
    copy = shutil.copytree(folder, tmp_path / "copy")
    file_of = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    last = max(set(file_of.values()) - {file_of[name]})
    tensors = load_file(copy / last)
    stray = np.zeros_like(params["norm"]["scale"])
    save_file(tensors | {name: stray}, copy / last)
    assert_equal(read(load(copy).params), params)
    save_file(tensors | {"model.scale": stray}, copy / last)  # which the index does not know
    with pytest.raises(ValueError, match=r"nothing reads model\.scale"):
        load(copy)


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


@pytest.mark.parametrize(
    ("name", "config", "unread"),
    [
        ("llama2", small.LLAMA2, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gemma", small.GEMMA[1], "lm_head.weight"),
        ("deepseek", small.DEEPSEEK_V3, "model.layers.61.embed_tokens.weight"),
    ],
)
def test_what_published_checkpoints_have_beside_is_not_read(name, config, unread, tmp_path):
    folder, module = tmp_path / "saved", MODELS[name].module(config)
    params = random_params(module)
    save(folder, module, params)
    change_tensors(lambda tensors: tensors | {unread: np.zeros(1, np.float32)})(folder)
    assert_equal(read(load(folder).params), params)


@small.with_transformers
def test_the_text_model_is_read_from_one_that_sees_images(tmp_path):
    """Of Gemma 3, as its sizes from 4B on are published."""
    transformers = small.import_transformers()
    written = MODELS["gemma"].hugging_face.write_config(small.GEMMA[3])
    vision = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    seeing = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**written), vision_config=vision
        )
    )
    seeing.save_pretrained(tmp_path / "seeing")
    assert json.loads((tmp_path / "seeing/config.json").read_text())["model_type"] == "gemma3"
    loaded = load(tmp_path / "seeing")
    assert loaded.module.config == small.GEMMA[3]
    save(tmp_path / "text", loaded.module, loaded.params)
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    for name, tensor in text.state_dict().items():
        if name != "lm_head.weight":
            theirs = seeing.state_dict()["model.language_" + name]
            np.testing.assert_array_equal(tensor, theirs, err_msg=name)


def test_what_the_published_files_leave_out_is_the_default():
    """All that the config.json of Gemma 3 4B says of its text model."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    family = MODELS["gemma"]
    config = family.hugging_face.read_config({"model_type": "gemma3", "text_config": text})
    assert config == dataclasses.replace(family.sizes["3-4B"], vocab_size=262_208)


def test_what_stands_beside_a_checkpoint_is_kept(tmp_path):
    folder, module = tmp_path / "saved", MODELS["llama2"].module(small.LLAMA2)
    save(folder, module, random_params(module))
    change_config(
        **{"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 0},
        **{"max_position_embeddings": 4096, "auto_map": {"AutoConfig": "x.Y"}},
    )(folder)
    beside = [
        *("added_tokens.json", "chat_template.jinja", "configuration_x.py"),
        *("generation_config.json", "merges.txt", "modeling_x.py", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
    ]
    for name in beside:
        (folder / name).write_text(name)
    (folder / "notes.txt").write_text("ours")
    (folder / "tokenizer_old").mkdir()
    save(tmp_path / "again", module, load(folder).params, like=folder)
    again = {path.name: path.read_text() for path in (tmp_path / "again").glob("*[!s]")}
    assert {name: again.pop(name) for name in beside} == {name: name for name in beside}
    assert json.loads(again.pop("config.json")) == json.loads((folder / "config.json").read_text())
    assert not again


def test_the_tokens_of_a_text_model_are_kept(tmp_path):
    """Of Gemma 3 from 4B on, config.json says them in its text_config, or around it."""
    folder, module = tmp_path / "saved", MODELS["gemma"].module(small.GEMMA[3])
    save(folder, module, random_params(module))

    def seeing(text):
        return {
            "model_type": "gemma3",
            "eos_token_id": 5,
            "text_config": text | {"max_position_embeddings": 77},
        }

    rewrite(folder / "config.json", seeing)
    save(tmp_path / "again", module, load(folder).params, like=folder)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["eos_token_id"], written["max_position_embeddings"]) == (5, 77)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (None, "config.json is missing; name the folder of a checkpoint"),
        (small.GEMMA[1], "is a GemmaConfig of [0-9]+ tokens, and this a Llama2Config of 256"),
        (
            dataclasses.replace(small.LLAMA2, vocab_size=98),
            "is a Llama2Config of 98 tokens, and this a Llama2Config of 256; save it like the",
        ),
    ],
)
def test_a_model_is_saved_like_itself(other, complaint, tmp_path):
    if other is not None:
        family = "gemma" if other is small.GEMMA[1] else "llama2"
        module = MODELS[family].module(other)
        save(tmp_path / "other", module, random_params(module))
    module = MODELS["llama2"].module(small.LLAMA2)
    with pytest.raises(ValueError, match=complaint):
        save(tmp_path / "saved", module, random_params(module), like=tmp_path / "other")
    assert not (tmp_path / "saved").exists()


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


def test_what_cannot_be_saved_is_said(deep, tmp_path):
    folder, module, params = deep
    with pytest.raises(ValueError, match="shard_bytes is 0; make it 1 or more"):
        save(tmp_path / "saved", module, params, shard_bytes=0)
    with pytest.raises(ValueError, match="params is of type list; pass the params of a state"):
        save(tmp_path / "saved", module, [params])
    with pytest.raises(ValueError, match=r"\n  and \d+ more$"):
        renamed = {f"blocks_{i}": block for i, block in enumerate(params.values())}
        save(tmp_path / "saved", module, renamed)
    for taken in folder, folder / "config.json":
        with pytest.raises(ValueError, match="holds something already; name a new folder"):
            save(taken, module, params)
    with pytest.raises(ValueError, match="RMSNorm is none of the models deepseek, gemma, llama2"):
        from models.parts.norm import RMSNorm

        save(tmp_path / "saved", RMSNorm(DEEP), params)
    wrong = {key: value for key, value in params.items() if key != "norm"} | {
        "gain": params["norm"]["scale"],
        "embed": {"embedding": np.zeros((255, 64), np.int32)},
    }
    with pytest.raises(ValueError) as raised:
        save(tmp_path / "saved", module, wrong)
    assert str(raised.value).splitlines() == [
        "these are not the parameters of this model:",
        "  embed/embedding has shape (255, 64), in the model (256, 64)",
        "  embed/embedding is of type int32; use one of float32, float16, bfloat16",
        "  norm/scale is missing",
        "  the model has no gain",
    ]
    assert not list(tmp_path.iterdir())


def test_a_leaf_that_processes_share_is_read_by_these_and_not_saved(tmp_path):
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.launch", "--num_processes=3", "--"),
            *("tests.models.spread_program", f"--save_to={tmp_path}/saved"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    lines = launched.stdout.splitlines()
    read = [path for line in lines if "] read:" in line for path in line.split(": ")[1].split()]
    module = MODELS["llama2"].module(small.LLAMA2)
    assert sorted(read) == sorted([*parameter_types(module), "head/kernel"])
    complaint = "head/kernel is spread over processes, of which none holds all of it"
    assert launched.stdout.count(complaint) == 3
    assert launched.stdout.count("is spread") == 3  # the head alone
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Broken:
    """A leaf whose device fails."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype=None, copy=None):
        raise OSError("the device is gone")


def test_a_save_that_fails_leaves_no_checkpoint(deep, tmp_path):
    _, module, params = deep
    scale = params["norm"]["scale"]
    broken = params | {"norm": {"scale": Broken(scale.shape, scale.dtype)}}
    with pytest.raises(OSError, match="the device is gone"):
        save(tmp_path / "saved", module, broken)
    (partial,) = tmp_path.iterdir()
    assert partial.suffix == ".partial"
    (partial / "rest").touch()
    save(tmp_path / "saved", module, params)
    assert files(tmp_path) == ["saved"]
    assert files(tmp_path / "saved") == ["config.json", "model.safetensors"]


def test_files_are_not_longer_than_asked(deep):
    folder = deep[0]
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    # Behind every header at most SHARD bytes, and so many that a further tensor has no place.
    assert all(SHARD - LARGEST < size < SHARD + 10_000 for size in sizes[:-1])
    total = sum(math.prod(each.shape) * 4 for each in parameter_types(deep[1]).values())
    assert 0 < sum(sizes) - total < 10_000 * len(sizes)
