import pytest

from experiments.size_costs import DEVICE, size_costs

PUBLISHED_PARAMETERS = {
    ("llama2", "7B"): 6_738_415_616,
    ("llama2", "13B"): 13_015_864_320,
    ("llama2", "70B"): 68_976_648_192,
    ("gemma", "7B"): 8_537_680_896,
    ("deepseek", "V2-Lite"): 15_706_484_224,
    ("deepseek", "V3"): 682_636_487_424,
    ("nemotron_h", "8B"): 8_100_852_736,
    ("nemotron_h", "56B"): 56_324_350_464,
}


@pytest.mark.parametrize("head_slices", [1, 2, 4])
@pytest.mark.parametrize(("family", "size"), PUBLISHED_PARAMETERS)
def test_memory_is_of_float32_parameters_gradients_and_two_moments(family, size, head_slices):
    costs = size_costs(family, size, head_slices)
    assert costs.source == ("estimated" if size == "V3" else "measured")
    assert costs.device == DEVICE.kind
    assert costs.start_s > 0  # else small stages would seem free
    assert costs.settings["head_slices"] == head_slices
    assert (costs.settings["seq_len"], costs.settings["dtype"]) == (4096, "bfloat16")
    owners = *costs.layers, *costs.tied
    published_bytes = 4 * PUBLISHED_PARAMETERS[family, size]
    assert sum(each.param_bytes for each in owners) == published_bytes
    assert sum(each.grad_bytes for each in owners) == published_bytes
    state_bytes = sum(each.state_bytes for each in owners)
    assert state_bytes == pytest.approx(2 * published_bytes, rel=1e-6)  # and a count of steps


@pytest.mark.parametrize(("size", "width", "kv_width"), [("13B", 5120, 5120), ("70B", 8192, 1024)])
def test_attention_saves_no_square_of_the_sequence(size, width, kv_width):
    """It saves queries, keys, values and what they give; and a number a head and position."""
    (attention,) = (
        layers[0]
        for kind, layers in size_costs("llama2", size).kinds.items()
        if kind.endswith("attention")
    )
    saved_bytes = 4096 * 2 * (2 * width + 2 * kv_width)
    assert saved_bytes <= attention.saved_bytes <= 2 * saved_bytes


@pytest.mark.parametrize("head_slices", [2, 4])
@pytest.mark.parametrize(("family", "size"), PUBLISHED_PARAMETERS)
def test_only_the_head_differs_in_slices(family, size, head_slices):
    whole, sliced = size_costs(family, size), size_costs(family, size, head_slices)
    *before, _ = whole.layers
    assert sliced.layers[: len(before)] == tuple(before)
    assert len(sliced.layers) == len(before) + head_slices
    assert sliced.start_s == whole.start_s
