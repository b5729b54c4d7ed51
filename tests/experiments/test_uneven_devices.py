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
    assert row["step_ms"] / 1e3 < 1.2 * 4 * work_s / 1.25  # beside fill and drain
    # A device that takes half of the work four times as long takes 2.5 times its share; layers,
    # the first and the last in the main, are no even halves.
    assert row["over_best_for_equal"] > 2
    assert row["over_all_for_equal"] > 1 and row["over_adaptis_and_mist"] > 1


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--speeds=1,0", "give one number above 0 for each device"),
        ("--speeds=fast", "give one number above 0 for each device"),
        ("--speeds=", "give one number above 0 for each device"),
        ("--models=llama4", "give some of jamba-100B"),
    ],
)
def test_what_cannot_be_planned_for(flag, says):
    run = run_program("uneven_devices", flag)
    assert run.returncode != 0
    assert says in run.stderr and "Traceback" not in run.stderr
