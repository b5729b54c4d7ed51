import json

import jax
import pytest

from tests.experiments.program import run_program

ARGUMENTS = (
    "--model_width=64",
    "--vocab_size=32",
    "--microbatch_size=1",
    "--sequence_length=4",
    "--num_repetitions=2",
)


def split_cost(*arguments):
    return run_program("split_cost", *ARGUMENTS, *arguments)


def test_ratios_are_printed_and_written(tmp_path):
    path = tmp_path / "results.json"
    run = split_cost(f"--json_output={path}")
    assert run.returncode == 0, run.stderr
    results = json.loads(path.read_text())
    assert results["settings"]["model_width"] == 64
    assert results["jax"] == jax.__version__
    ratios = results["split_over_whole"]
    assert list(ratios) == ["attention", "mlp", "block", "head", "all"]
    for name, ratio in ratios.items():
        assert f"{name} " in run.stdout and f"{ratio['cpu_time']:.2f}" in run.stdout
        quartiles = ratio["cpu_time_first_quartile"], ratio["cpu_time_third_quartile"]
        assert 0 < quartiles[0] <= ratio["cpu_time"] <= quartiles[1]
        assert 0.9 < ratio["flops"] <= 1.03
    flops = [ratios[name]["flops"] for name in ratios]
    assert min(flops[:-1]) < flops[-1] < max(flops[:-1])


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--model_width=96", "no multiple of 64"),
        ("--json_output=/no/such/folder/results.json", "its folder does not exist"),
    ],
)
def test_a_bad_flag_is_named(flag, complaint):
    run = split_cost(flag)
    assert run.returncode != 0
    assert complaint in run.stderr + run.stdout
