import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from models.gemma import SIZES, Gemma, GemmaConfig
from models.hugging_face.gemma import read_config, stored_as, write_config

# One of each generation. The heads are wider than their share of the model, the window is shorter
# than the tokens, the caps are low enough to bend, and Gemma 3 has a global block.
WIDTHS: dict[str, Any] = {
    "vocab_size": 97,
    "model_width": 24,
    "mlp_width": 36,
    "num_heads": 4,
    "head_width": 10,
}
SMALL = {
    1: GemmaConfig(**WIDTHS, generation=1, num_blocks=2, num_kv_heads=1, dtype=jnp.float32),
    2: GemmaConfig(
        **WIDTHS,
        generation=2,
        num_blocks=3,
        num_kv_heads=2,
        window=5,
        query_pre_attn_scalar=6,
        score_soft_cap=2.0,
        logit_soft_cap=3.0,
        dtype=jnp.float32,
    ),
    3: GemmaConfig(
        **WIDTHS,
        generation=3,
        num_blocks=7,
        num_kv_heads=2,
        window=5,
        query_pre_attn_scalar=6,
        rope_theta=1_000.0,
        local_rope_theta=100.0,
        rope_slower=8.0,
        dtype=jnp.float32,
    ),
}
TOKENS_BT = np.random.default_rng(0).integers(0, 97, size=(2, 23)).astype(np.int32)

with_transformers = pytest.mark.filterwarnings("ignore")  # which warns of its own future


def import_transformers():
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip("torch")
        return pytest.importorskip("transformers")


def make_reference(config):
    """The PyTorch model that transformers makes of our config.json."""
    transformers, written = import_transformers(), write_config(config)
    written.pop("layer_types", None)  # transformers itself shall say which blocks are local
    described = transformers.AutoConfig.for_model(**written)
    return transformers.AutoModelForCausalLM.from_config(described, attn_implementation="eager")


def random_reference(config):
    """The same with every parameter random, and its tensors."""
    reference, rng = make_reference(config).eval(), np.random.default_rng(1)
    for parameter in reference.parameters():
        noise = rng.normal(size=parameter.shape, scale=0.3).astype(np.float32)
        parameter.data = parameter.data.new_tensor(noise)
    return reference, {name: x.numpy() for name, x in reference.state_dict().items()}


def shapes(config):
    params = jax.eval_shape(Gemma(config).init, jax.random.key(0), TOKENS_BT)["params"]
    return {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}


def read_params(config, tensors):
    wanted = shapes(config)
    flat = {
        path: stored.read([tensors[name] for name in stored.names], wanted[path])
        for path, stored in stored_as(config).items()
    }
    return {"params": traverse_util.unflatten_dict(flat, sep="/")}


# As published with the checkpoints, embeddings counted once.
@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("2B", 2_506_172_416),
        ("7B", 8_537_680_896),
        ("2-2B", 2_614_341_888),
        ("2-9B", 9_241_705_984),
        ("2-27B", 27_227_128_320),
        ("3-1B", 999_885_952),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(size, count):
    assert sum(map(math.prod, shapes(SIZES[size]).values())) == count


# Published with the image encoder only, so counted in another model of these widths.
@with_transformers
@pytest.mark.parametrize("size", ["3-4B", "3-12B", "3-27B"])
def test_text_models_have_as_many_parameters_as_those_of_transformers(size):
    with warnings.catch_warnings(action="ignore"):
        torch = pytest.importorskip("torch")
    with torch.device("meta"):
        count = sum(x.numel() for x in make_reference(SIZES[size]).parameters())
    assert sum(map(math.prod, shapes(SIZES[size]).values())) == count


@with_transformers
@pytest.mark.parametrize("generation", SMALL)
def test_logits_equal_those_of_transformers(generation):
    config = SMALL[generation]
    reference, tensors = random_reference(config)
    params, apply = read_params(config, tensors), jax.jit(Gemma(config).apply)
    tokens = reference.lm_head.weight.new_tensor(TOKENS_BT).long()
    expected = reference(tokens).logits.detach().numpy()
    # The same float32 sums in another order; logits reach about 7.
    np.testing.assert_allclose(apply(params, TOKENS_BT), expected, rtol=1e-4, atol=1e-4)

    # The last positions of the second row are padding, which no real position sees.
    real_BT = np.arange(23) < np.array([[23], [14]])
    mask = tokens.new_tensor(real_BT)
    expected = reference(tokens * mask, attention_mask=mask).logits.detach().numpy()
    logits = apply(params, TOKENS_BT * real_BT)
    np.testing.assert_allclose(logits[real_BT], expected[real_BT], rtol=1e-4, atol=1e-4)


@with_transformers
@pytest.mark.parametrize("generation", SMALL)
def test_parameters_are_written_as_they_were_read(generation):
    config = SMALL[generation]
    _, tensors = random_reference(config)
    flat = traverse_util.flatten_dict(read_params(config, tensors)["params"], sep="/")
    written = {
        name: tensor
        for path, stored in stored_as(config).items()
        for name, tensor in zip(stored.names, stored.write(flat[path]), strict=True)
    }
    assert shapes(config).keys() == flat.keys()
    assert tensors.keys() - written.keys() == {"lm_head.weight"}  # the embedding, stored once
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize("config", [*SMALL.values(), *SIZES.values()])
def test_configs_are_read_as_they_were_written(config):
    read = read_config(write_config(config), dtype=config.dtype, param_dtype=config.param_dtype)
    assert read == config


@with_transformers
@pytest.mark.parametrize("generation", SMALL)
def test_configs_are_read_as_transformers_writes_them(generation):
    config = SMALL[generation]
    assert read_config(make_reference(config).config.to_dict(), dtype=jnp.float32) == config


@with_transformers
@pytest.mark.parametrize(("model_type", "size"), [("gemma", "7B"), ("gemma2", "2-2B")])
def test_sizes_are_those_that_transformers_has_as_defaults(model_type, size):
    defaults = import_transformers().AutoConfig.for_model(model_type)
    assert read_config(defaults.to_dict()) == SIZES[size]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", ["full_attention"] * 7),
        ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}),
        ("attention_bias", True),
        ("tie_word_embeddings", False),
        ("use_bidirectional_attention", True),
    ],
)
def test_files_that_ask_for_another_model_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} is .* Gemma 3 is built with"):
        read_config(write_config(SMALL[3]) | {key: value})


def test_factors_before_the_head_give_the_logits():
    model = Gemma(dataclasses.replace(SMALL[1], num_blocks=0))  # the head is the same
    params = model.init(jax.random.key(0), TOKENS_BT)
    x_BTD, kernel_DV = model.apply(params, TOKENS_BT, before_head=True)
    np.testing.assert_array_equal(x_BTD @ kernel_DV, model.apply(params, TOKENS_BT))


def test_capped_logits_have_no_factors():
    with pytest.raises(ValueError, match=r"capped at 3.0 are no product"):
        jax.eval_shape(lambda: Gemma(SMALL[2]).init(jax.random.key(0), TOKENS_BT, before_head=True))


@pytest.mark.parametrize(
    ("generation", "changes", "message"),
    [
        (1, {"generation": 4}, "no Gemma 4"),
        (1, {"head_width": 9}, "head_width 9 .* even"),
        (2, {"num_kv_heads": 3}, "3 key-value heads .* 4 query heads"),
        (1, {"window": 5}, "Gemma 1 has no window"),
        (3, {"score_soft_cap": 50.0}, "Gemma 3 has no score_soft_cap"),
        (2, {"rope_slower": 8.0}, "Gemma 2 has no rope_slower"),
        (2, {"window": None}, "Gemma 2 needs window"),
        (2, {"window": 0}, "sees 0 positions"),
        (3, {"local_rope_theta": None}, "Gemma 3 needs local_rope_theta"),
    ],
)
def test_configs_that_are_no_gemma_are_refused(generation, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL[generation], **changes)
