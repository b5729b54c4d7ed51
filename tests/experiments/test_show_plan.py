import subprocess
import sys

import pytest


def show_plan(*arguments):
    command = [sys.executable, "-m", "experiments.show_plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("model", "size", "first_lines"),
    [
        # The layers of the pattern, the embedding and the head; the published number of parameters.
        ("nemotron_h", "56B", "120 layers, 56,324,350,464 parameters"),
        # Two layers a block, the embedding and the head. With the block that predicts the token
        # after the next, V3 has what joins, and its head twice.
        ("deepseek", "V3", "128 layers, 682,636,487,424 parameters"),
        ("llama2", "70B", "162 layers, 68,976,648,192 parameters"),
    ],
)
def test_the_largest_models_are_not_allocated(model, size, first_lines):
    run = show_plan(f"--model={model}", f"--size={size}", "--sequence_length=256")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == first_lines
    assert lines[2].split()[:2] == ["0", "embed"]
    assert lines[-1].split()[1].startswith("head")


def test_a_size_of_another_model_is_named():
    run = show_plan("--model=llama2", "--size=56B")
    assert run.returncode != 0
    assert "the model has no such size; use 7B, 13B, 70B, tiny" in run.stderr + run.stdout
