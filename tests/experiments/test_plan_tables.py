"""The table of published models, of a search that is too short to be good."""

import json
from pathlib import Path

import pytest

from tests.experiments.program import run_program
from tests.published import published_plans


@pytest.mark.parametrize("memory_of_1f1b", [False, True])
def test_rows_stand_beside_what_was_published(tmp_path: Path, memory_of_1f1b: bool) -> None:
    path = tmp_path / "table.json"
    run = run_program(
        "plan_tables",
        *("--sizes=4x8", "--models=nemotron-h-4B", "--seeds=0,1", "--time_limit_s=0.1"),
        *(f"--memory_of_1f1b={memory_of_1f1b}", f"--json_output={path}"),
    )
    assert run.returncode == 0, run.stderr
    table = json.loads(path.read_text())
    assert [row["seed"] for row in table["rows"]] == [0, 1]
    (tuned,) = (each for each in published_plans("tuned") if str(each) == "nemotron-h-4B 4x8 tuned")
    for row in table["rows"]:
        assert row["step_ms"] * row["over_tuned"] == pytest.approx(
            tuned.makespan_s * 1e3, rel=1e-4
        )  # four decimals
        assert row["over_any_tuned"] <= row["over_tuned"]
        assert row["over_1f1b"] > 1
    (mean,) = table["means"]
    assert mean["num_rows"] == 2
    first, second = (row["over_tuned"] for row in table["rows"])
    assert mean["mean_over_tuned"] ** 2 == pytest.approx(first * second, rel=1e-3)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--sizes=4x", "give some of 16x32"),
        ("--models=llama", "give some of jamba-100B"),
        ("--seeds=a", "give whole numbers"),
        ("--head_slices=0", "give whole numbers of 1 or more"),
    ],
)
def test_a_flag_that_names_nothing_is_refused(flag: str, says: str) -> None:
    run = run_program("plan_tables", flag)
    assert run.returncode == 1
    assert says in run.stderr and "Traceback" not in run.stderr
