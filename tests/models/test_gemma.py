import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from models.gemma import SIZES, Gemma
from models.hugging_face.gemma import read_config, write_config
from tests.models.small import GEMMA as SMALL
from tests.models.small import import_transformers, make_reference, with_transformers

TOKENS_BT = np.zeros((2, 23), np.int32)


def shapes(config):
    params = jax.eval_shape(Gemma(config).init, jax.random.key(0), TOKENS_BT)["params"]
    return {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}


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
        count = sum(x.numel() for x in make_reference("gemma", SIZES[size]).parameters())
    assert sum(map(math.prod, shapes(SIZES[size]).values())) == count


@pytest.mark.parametrize("config", [*SMALL.values(), *SIZES.values()])
def test_configs_are_read_as_they_were_written(config):
    read = read_config(write_config(config), dtype=config.dtype, param_dtype=config.param_dtype)
    assert read == config


@with_transformers
@pytest.mark.parametrize("generation", SMALL)
def test_configs_are_read_as_transformers_writes_them(generation):
    config = SMALL[generation]
    assert (
        read_config(make_reference("gemma", config).config.to_dict(), dtype=jnp.float32) == config
    )


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
        ("sliding_window_pattern", 4),
        ("hidden_activation", "relu"),
    ],
)
def test_files_that_ask_for_another_model_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} is .* only .* is supported"):
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
