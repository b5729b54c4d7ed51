import json

import pytest

from tests.experiments.program import run_program


def test_a_device_is_slowed_in_the_middle(tmp_path):
    run = run_program(
        *("slowed", "--strategies=gpipe", "--num_steps=3"),
        *("--num_microbatches=4", "--slow_devices=0", f"--json_output={tmp_path / 'slowed.json'}"),
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "slowed.json").read_text())
    assert results["settings"]["factor"] == 3.0
    (row,) = results["rows"]
    # A device that is busy for most of the step takes three times as long.
    assert row["old_s"] > 1.5 * row["before_s"]
    assert row["speeds"][0] == pytest.approx(1 / 3, rel=0.1)
    assert row["num_compilations"] == 0
    # 4 microbatches need not all go forward before the first goes back: of 45 parts of the step,
    # each of them a device's forward and backward of a microbatch, 36 are the slow device's own.
    assert row["is_new"]
    assert row["predicted_new_s"] < 0.9 * row["predicted_old_s"]
    assert row["loss_error"] < 1e-5
    assert row["every_s"].keys() == {"before", "old", "new", "other"}
    for words in "another order of tasks and transfers", "other stages would take":
        assert words in run.stdout
