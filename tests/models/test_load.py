"""Checkpoints of Hugging Face: read, trained from, and written back."""

import dataclasses
import functools
import gc
import json
import shutil
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
from models.load import load
from models.save import save
from tests.models import small
from tests.models.checkpoints import (
    LARGEST,
    SHARD,
    assert_equal,
    change_tensors,
    files,
    random_params,
    read,
)
from tests.noted import Noted

pytestmark = pytest.mark.usefixtures("lenient")

TOKENS_BT = np.random.default_rng(0).integers(0, 97, size=(2, 13)).astype(np.int32)
REAL_BT = np.arange(13) < np.array([[13], [9]])  # the second sequence is padded
SHARD_BYTES = 20_000


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
