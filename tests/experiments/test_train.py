import json
import math
import subprocess
import sys

import pytest

ARGUMENTS = ("--num_devices=2", "--num_microbatches=2", "--batch_size=4", "--sequence_length=16")


def train(*arguments):
    command = [sys.executable, "-m", "experiments.train", *ARGUMENTS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_training_writes_its_results(tmp_path):
    results_path = tmp_path / "results.json"
    dump_path = tmp_path / "dump"
    run = train("--num_steps=2", f"--json_output={results_path}", f"--dump_to={dump_path}")
    assert run.returncode == 0, run.stderr
    results = json.loads(results_path.read_text())
    assert results["settings"]["num_microbatches"] == 2
    assert len(results["losses"]) == 2
    assert [step for step, _ in results["eval_losses"]] == [1, 2]
    # Untrained, the model knows little more than that there are 256 bytes.
    assert results["losses"][0] == pytest.approx(math.log(256), rel=0.2)
    assert results["num_tasks"] == 2 * 2 * 2  # stages x microbatches x (forward, backward)
    assert results["num_compilations"] > 0
    assert results["step_s"] > 0 and results["host_s_per_task"] > 0
    assert results["plan"] in run.stdout
    assert any(dump_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--size=8B", "the model has no such size; use 7B, 13B, 70B, tiny"),
        ("--num_devices=0", "num_devices"),
        ("--batch_size=5", "num_microbatches does not divide batch_size"),
        ("--json_output=/no/such/folder/results.json", "its folder does not exist"),
        ("--strategy=no-such-strategy", "no-such-strategy"),
        ("tiny", "belong to no flag"),
        ("--local_device_ids=0", "is for processes of --coordinator_address"),
    ],
)
def test_a_bad_flag_is_named(flag, complaint):
    run = train(flag)
    assert run.returncode != 0
    assert complaint in run.stderr + run.stdout
