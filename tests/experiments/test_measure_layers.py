import subprocess
import sys

import pytest

from jaxptis.performance import Costs
from tests.experiments.program import assert_refused


def measure_layers(*arguments):
    command = [sys.executable, "-m", "experiments.measure_layers", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_measured_costs_beside_estimates(tmp_path):
    path = tmp_path / "costs.json"
    run = measure_layers(
        "--model=gemma",
        "--size=tiny",
        "--seq_len=16",
        "--dtype=bfloat16",
        "--optimizer=lion",
        "--source=measured",
        f"--json_output={path}",
    )
    assert run.returncode == 0, run.stderr
    costs = Costs.load(path)
    assert (costs.source, costs.device) == ("measured", "cpu")
    assert costs.settings["model"] == "gemma" and costs.settings["seq_len"] == 16
    assert costs.settings["dtype"] == "bfloat16" and costs.settings["optimizer"] == "lion"
    assert costs.layers[0].name == "embed"
    block = next(layer for layer in costs.layers if layer.name == "layers_0/mlp")
    assert block.input_bytes == 2 * 16 * 128  # the stream, in 16 bits
    assert block.state_bytes == block.param_bytes == block.grad_bytes  # one moment, in 32 bits
    # A head tied to the embedding is on both their devices.
    assert costs.tied[0].layers == ("embed", "embed#2")
    assert f"14 layers of {len(costs.kinds)} kinds, measured for cpu" in run.stdout
    ratios = costs.settings["estimated_over_measured"]
    assert ratios.keys() == costs.kinds.keys()
    for kind, each in ratios.items():
        assert all(ratio > 0 for ratio in each.values())
        assert f"{each['B']:.2f}" in run.stdout
        assert f"{costs.kinds[kind][0].backward_s * 1e3:.3f}" in run.stdout


def test_a_head_in_slices_stands_beside_the_whole_one(tmp_path):
    run = measure_layers(
        "--model=nemotron_h",
        "--size=tiny",
        "--seq_len=16",
        "--head_slices=1,2",
        "--source=measured",
        f"--json_output={tmp_path / 'costs.json'}",
    )
    assert run.returncode == 0, run.stderr
    whole, sliced = (Costs.load(tmp_path / f"costs{end}.json") for end in ("", "-2-slices"))
    # What both have was measured once: its seconds are the same to the last digit.
    assert whole.layers[:-1] == sliced.layers[:-2]
    assert whole.layers[0].backward_s > 0
    names = [layer.name for layer in (whole.layers[-1], *sliced.layers[-2:])]
    assert names == ["head", "head[:,0:128]", "head[:,128:256]"]
    assert (whole.settings["head_slices"], sliced.settings["head_slices"]) == (1, 2)
    assert f"{len(whole.layers)} layers of {len(whole.kinds)} kinds, measured for cpu" in run.stdout
    assert f"{len(sliced.kinds)} kinds, the head in 2 slices, measured" in run.stdout


def test_more_slices_than_a_vocabulary_has_tokens():
    run = measure_layers("--size=tiny", "--seq_len=16", "--head_slices=1,100000")
    assert_refused(run, "100000")


def test_the_largest_models_are_not_allocated(tmp_path):
    path = tmp_path / "costs.json"
    run = measure_layers(
        "--size=70B", "--seq_len=64", "--device=NVIDIA H200", f"--json_output={path}"
    )
    assert run.returncode == 0, run.stderr
    costs = Costs.load(path)
    # The published number of parameters, in 32 bits, with two moments.
    assert sum(layer.param_bytes for layer in costs.layers) == 4 * 68_976_648_192
    assert sum(layer.state_bytes for layer in costs.layers) == 8 * 68_976_648_192
    assert (costs.source, costs.device) == ("estimated", "NVIDIA H200")
    assert "162 layers of 4 kinds, estimated for NVIDIA H200" in run.stdout


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--size=8B", "the model has no such size; use 7B, 13B, 70B, small, tiny"),
        ("--json_output=/no/such/folder/costs.json", "its folder does not exist"),
        (
            ("--source=measured", "--device=NVIDIA H200"),
            "is the device that is here; drop --device",
        ),
        ("--device=Abacus", "NVIDIA H200"),
        ("--head_slices=", "write counts of 1 or more, each once, as in 1,2,4"),
        ("--head_slices=1,0", "write counts of 1 or more, each once, as in 1,2,4"),
        ("tiny", "belong to no flag"),
    ],
)
def test_a_bad_flag_is_named(flag, complaint):
    run = measure_layers(*([flag] if isinstance(flag, str) else flag))
    assert run.returncode != 0
    assert complaint in run.stderr + run.stdout
