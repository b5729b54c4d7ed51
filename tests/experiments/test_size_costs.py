import pytest

from experiments.size_costs import MEASURED, corrected, size_costs
from jaxptis.performance import Costs, LayerCost

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


@pytest.mark.parametrize(("family", "size"), PUBLISHED_PARAMETERS)
def test_memory_is_of_float32_parameters_gradients_and_two_moments(family, size):
    costs = size_costs(family, size)
    assert costs.source == ("measured" if size == MEASURED[family] else "estimated")
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


def layer(name, forward_s, saved_bytes, recompute_s=0.0):
    return LayerCost(
        name=name,
        forward_s=forward_s,
        backward_s=2 * forward_s,
        input_grad_s=forward_s,
        weight_grad_s=forward_s,
        recompute_s=recompute_s,
        saved_bytes=saved_bytes,
    )


def test_each_number_is_corrected_by_its_own_ratio():
    known = Costs((layer("embed", 1.0, 0), layer("layers_0/mlp", 2.0, 100)))
    measured = Costs(
        (layer("embed", 3.0, 5), layer("layers_0/mlp", 3.0, 25)),
        start_s=0.5,
        settings={"size": "small"},
    )
    large = Costs(
        (layer("embed", 10.0, 0), layer("layers_7/mlp", 10.0, 80, 1.0), layer("new", 10.0, 8))
    )
    embed, mlp, new = corrected(large, known, measured).layers
    assert (embed.forward_s, embed.backward_s, embed.saved_bytes) == (30.0, 60.0, 0)
    assert (mlp.forward_s, mlp.saved_bytes, mlp.recompute_s) == (15.0, 20, 1.0)
    assert new == large.layers[2]
    assert corrected(large, known, measured).start_s == 0.5
