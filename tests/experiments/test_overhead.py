import json

import pytest

from tests.experiments.program import run_program

ARGUMENTS = (
    "--num_devices=2",
    "--num_host_steps=2",
    "--model_widths=16",
    "--sequence_length=8",
    "--microbatch_size=1",
    "--num_microbatches=2",
    "--num_steps=2",
)


def overhead(*arguments):
    return run_program("overhead", *ARGUMENTS, *arguments)


def test_runs_are_added_to_a_file(tmp_path):
    path = tmp_path / "overhead.json"
    path.write_text('["an earlier run"]')
    run = overhead("--schedules=1f1b,zb-h1", "--microbatches=1,2", f"--json_output={path}")
    assert run.returncode == 0, run.stderr
    earlier, results = json.loads(path.read_text())
    assert earlier == "an earlier run"
    assert results["settings"]["num_steps"] == 2

    ratios = results["pipeline_over_plain"]
    assert [ratio["recompute"] for ratio in ratios] == ["none", "cheap"]
    for ratio in ratios:
        assert ratio["model_width"] == 16
        assert ratio["num_tasks"] == 4 * 2 * 2  # stages x microbatches x (forward, backward)
        assert ratio["cpu_time_first_quartile"] <= ratio["cpu_time_third_quartile"]
        assert min(ratio["cpu_time"], ratio["wall_time"]) > 0

    cases = [(time["schedule"], time["num_microbatches"]) for time in results["host_time"]]
    assert cases == [("1f1b", 1), ("1f1b", 2), ("zb-h1", 1), ("zb-h1", 2)]
    for (schedule, count), time in zip(cases, results["host_time"], strict=True):
        # Split, a stage has three tasks a microbatch; the first stage has no input gradient.
        assert time["num_tasks"] == count * {"1f1b": 2 + 2, "zb-h1": 2 + 3}[schedule]
        # Forth and back between the two stages; what can go together does.
        assert time["num_values"] == 2 * count
        assert time["num_transfers"] <= time["num_values"]
        assert count > 1 or time["num_transfers"] == 2
        # Zeros on each device, and the mean of the loss.
        assert time["num_other"] == 2 + 1
        check_times(time)


def check_times(time):
    """Check that what the operations take is positive, and adds up to the whole."""
    operations = time["operations"]
    assert list(operations) == ["task", "transfer", "other"]
    assert all(us > 0 for operation in operations.values() for us in operation.values())
    counts = {
        "task": time["num_tasks"],
        "transfer": time["num_transfers"],
        "other": time["num_other"],
    }
    total_us = sum(
        counts[kind] * (operation["call_us"] + operation["loop_us"])
        for kind, operation in operations.items()
    )
    assert time["host_us_per_task"] == pytest.approx(total_us / time["num_tasks"])
    whole = ("thread_us_per_task", "wall_us_per_task", "step_thread_us_per_task")
    assert all(time[name] > 0 for name in whole)


def test_one_device_moves_nothing(tmp_path):
    path = tmp_path / "overhead.json"
    run = overhead(
        "--num_devices=1",
        "--model_widths=",
        "--schedules=1f1b",
        "--microbatches=3",
        f"--json_output={path}",
    )
    assert run.returncode == 0, run.stderr
    (time,) = json.loads(path.read_text())[0]["host_time"]
    assert (time["num_tasks"], time["num_transfers"], time["num_values"]) == (6, 0, 0)
    assert "transfer" not in time["operations"]


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--microbatches=8,0", "give whole numbers of 1 or more"),
        ("--model_widths=12", "give multiples of 8"),
        ("--json_output=/no/such/folder/results.json", "its folder does not exist"),
        ("--schedules=fastest", "give names of schedules"),
    ],
)
def test_a_bad_flag_is_named(flag, complaint):
    run = overhead(flag)
    assert run.returncode != 0
    assert complaint in run.stderr + run.stdout
