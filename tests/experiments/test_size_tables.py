"""A few rows of the table of published sizes, of a search that is too short to be good."""

import json
import subprocess
import sys

import pytest


def size_tables(*arguments):
    command = [sys.executable, "-m", "experiments.size_tables", "--time_limit_s=0.1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "table.json"
    models = "--models=deepseek:V3,gemma:7B"
    run = size_tables(models, "--num_devices=8,64", f"--json_output={path}")
    assert run.returncode == 0, run.stderr
    return path, run.stdout


def gemma_on(num_devices, table):
    rows = json.loads(table[0].read_text())["rows"]
    (row,) = (x for x in rows if "strategies" in x and x["num_devices"] == num_devices)
    return row


def test_every_strategy_stands_beside_best(table):
    path, printed = table
    figures = json.loads(path.read_text())
    row = gemma_on(8, table)
    assert (row["model"], row["num_microbatches"]) == ("gemma:7B", 16)
    tried = {each["strategy"]: each for each in row["strategies"]}
    assert {"adaptis", "best", "mist", "1f1b(partition=balanced)"} <= tried.keys()
    for each in tried.values():
        fits = each["step_s"] is not None and each["peak_bytes"] <= 80e9
        assert fits == (each["refusal"] is None)
        if fits:
            assert tried["best"]["step_s"] <= each["step_s"]
            if each["strategy"] != "best":
                assert each["head_slices"] == 1 and row["bound_s"] <= each["step_s"]
    assert tried["best"]["head_slices"] in (1, 2, 4)
    assert row["bound_with_slices_s"] <= tried["best"]["step_s"]
    whole = tried["best(head_slices=1)"]
    assert whole["step_s"] <= min(x["step_s"] for x in tried.values() if x["head_slices"] == 1)
    base, best = tried["interleaved(partition=uniform)"], tried["best"]
    assert (base["num_stages"], base["recompute"]) == (16, ["cheap"])
    for mean in figures["means"]:
        if mean["of"] in ("gemma", "uneven families"):
            ratio = base["step_s"] / best["step_s"]
            assert mean["over interleaved"] == pytest.approx(ratio, abs=1e-4)  # four decimals
            ratio = base["step_s"] / whole["step_s"]
            assert mean["over interleaved, head whole"] == pytest.approx(ratio, abs=1e-4)
            assert mean["rows with interleaved"] == 1
    assert f"{base['step_s'] / best['step_s']:.3f}" in printed


def test_stages_recompute_where_the_memory_is_too_small(table):
    """GPipe holds all microbatches of what its stages save."""
    row = gemma_on(8, table)
    (gpipe,) = (x for x in row["strategies"] if x["strategy"] == "gpipe(partition=uniform)")
    assert gpipe["recompute"] == ["all"] and gpipe["refusal"] is None


def test_what_cannot_be_planned_says_why(table):
    refusals = {
        (row["model"], row["num_devices"]): row["refusal"]
        for row in json.loads(table[0].read_text())["rows"]
        if "refusal" in row
    }
    for num_devices in 8, 64:
        # One layer of 256 experts has more than 80 GB of parameters, gradients and moments.
        refusal = refusals.pop(("deepseek:V3", num_devices))
        assert f"no plan fits the memory of {num_devices} devices" in refusal
        assert "experts/routed' alone needs" in refusal
    assert not refusals


def test_best_leaves_devices_empty_where_there_are_fewer_layers(table):
    tried = {each["strategy"]: each for each in gemma_on(64, table)["strategies"]}
    best = tried.pop("best(head_slices=1)")
    assert best["step_s"] and best["num_stages"] <= 58
    assert tried.pop("best")["step_s"] <= best["step_s"]
    assert all(each["step_s"] is None for each in tried.values())


def test_rows_of_the_same_settings_are_kept(table):
    path = table[0]
    before = path.read_text()
    arguments = "--models=gemma:7B", "--num_devices=8", f"--json_output={path}"
    run = size_tables(*arguments)
    assert run.returncode == 0, run.stderr
    assert path.read_text() == before
    run = size_tables(*arguments, "--time_limit_s=0.2")
    assert run.returncode == 1
    assert "was written with other settings" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--models=gemma", "give some of gemma:7B"),
        ("--num_devices=8,x", "give whole numbers of 1 or more"),
        ("--num_devices=0", "give whole numbers of 1 or more"),
    ],
)
def test_flags_that_name_nothing(flag, says):
    run = size_tables(flag)
    assert run.returncode == 1
    assert says in run.stderr and "Traceback" not in run.stderr
