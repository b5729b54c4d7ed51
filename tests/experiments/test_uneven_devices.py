import json

import pytest

from experiments.published import published_costs
from tests.experiments.program import run_program


def test_a_slow_device_gets_less(tmp_path):
    path = tmp_path / "uneven.json"
    arguments = "--models=llama3-8B", "--speeds=1,0.25", "--num_microbatches=4", "--time_limit_s=1"
    run = run_program("uneven_devices", *arguments, f"--json_output={path}")
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(path.read_text())["rows"]
    work_s = sum(x.forward_s + x.backward_s for x in published_costs("llama3-8B").layers)
    assert row["step_ms"] / 1e3 > 4 * work_s / 1.25
    # A device that takes half of the layers, and four times as long as thought, takes 1.6 shares.
    assert row["over_baselines"] > 1.4
    assert row["over_best_for_equal"] > 1.4


@pytest.mark.parametrize("speeds", ["1,0", "fast", ""])
def test_speeds_that_are_none(speeds):
    run = run_program("uneven_devices", f"--speeds={speeds}")
    assert run.returncode != 0
    assert "give one number above 0 for each device" in run.stderr
