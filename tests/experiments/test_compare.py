import dataclasses
import json
from itertools import chain

import jax
import pytest

import jaxptis
from experiments.compare import Row, errors
from experiments.sleeping import measure_asleep, slower
from jaxptis.performance import Costs, LayerCost
from tests.experiments.program import assert_refused, run_program
from tests.small_models import loss_fn, make_batch, make_params

ROW = Row(
    model="llama2",
    strategy="1f1b",
    predicted_s=1.0,
    measured_s=1.0,
    plain_s=None,
    predicted_bubble=0.0,
    measured_bubble=0.0,
    predicted_bytes=1,
    accounted_bytes=None,
    memory_ratio=None,
)
# Of eighths of a second, which add up without rounding.
COSTS = Costs(
    tuple(
        LayerCost(
            name=name, forward_s=1 / 8, backward_s=1 / 4, input_grad_s=1 / 8, weight_grad_s=1 / 8
        )
        for name in ("first", "blocks/0", "blocks/1", "head")
    )
)


def compare(*arguments):
    return run_program(
        *("compare", "--models=llama2", "--sequence_length=8"),
        *("--microbatch_size=1", "--num_microbatches=2", "--num_steps=1"),
        *arguments,
    )


def test_steps_that_compute(tmp_path):
    run = compare(
        "--strategies=interleaved,random",
        f"--json_output={tmp_path / 'steps.json'}",
        f"--html_output={tmp_path}",
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "steps.json").read_text())
    assert results["settings"]["strategies"] == ["interleaved", "random"]
    assert [row["strategy"] for row in results["rows"]] == ["interleaved", "random"]
    for row in results["rows"]:
        assert row["ratio"] == row["predicted_s"] / row["measured_s"] > 0
        assert row["plain_s"] > 0
        assert 0.8 < row["memory_ratio"] < 1.2
        page = (tmp_path / f"llama2.{row['strategy']}.html").read_text()
        assert f"llama2 tiny, {row['strategy']}" in page
    assert "tasks asleep" not in page
    assert "predicted over measured: off by" in run.stdout


def test_steps_that_sleep(tmp_path):
    run = compare(
        *("--strategies=1f1b", "--num_devices=8", "--asleep", "--slower=2"),
        f"--json_output={tmp_path / 'steps.json'}",
        f"--html_output={tmp_path}",
    )
    assert run.returncode == 0, run.stderr
    (row,) = json.loads((tmp_path / "steps.json").read_text())["rows"]
    busy_s, predicted_s = (
        row[f"{which}_s"] * (1 - row[f"{which}_bubble"]) for which in ("measured", "predicted")
    )
    assert busy_s >= predicted_s > 0  # none sleeps for less than it costs
    assert row["plain_s"] is row["accounted_bytes"] is row["memory_ratio"] is None
    assert "these are times of no model" in run.stdout
    assert "tasks asleep" in (tmp_path / "llama2.1f1b.html").read_text()


@pytest.mark.parametrize("strategy", ["zb-h1", "interleaved"])
def test_every_task_sleeps_for_what_it_costs(strategy):
    costs = slower(COSTS, 1 / 128)
    pipelined = jaxptis.pipeline(
        loss_fn, num_microbatches=2, devices=jax.devices()[:2], strategy=strategy, costs=costs
    )
    params, batch = make_params(2), make_batch()
    pipeline = pipelined.bind(None, params, batch).compiled.pipeline
    timeline = measure_asleep(pipeline, params, batch, num_steps=1)
    spans = {span.task: span for span in chain(*timeline.spans)}
    predicted = {span.task: span for span in chain(*pipeline.timeline.spans)}
    ran = {task for task in predicted if task.kind != "I" or task.stage > 0}
    assert spans.keys() == ran  # the first stage makes no input gradient
    for task, span in spans.items():
        expected = predicted[task]
        assert span.end_s - span.start_s >= expected.end_s - expected.start_s


def test_all_takes_as_many_times_as_long():
    names = ("forward_s", "backward_s", "input_grad_s", "weight_grad_s")
    for before, after in zip(COSTS.layers, slower(COSTS, 4.0).layers, strict=True):
        assert [getattr(after, name) for name in names] == [0.5, 1.0, 0.5, 0.5]
        assert dataclasses.replace(after, **{n: getattr(before, n) for n in names}) == before


def test_errors_are_counted_on_both_sides():
    rows = [dataclasses.replace(ROW, predicted_s=s) for s in (0.9, 1.0, 1.02, 1.3, 0.5)]
    assert errors(rows) == pytest.approx((0.1, 0.5))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=llama", "give names of families: deepseek"),
        ("--size=7C", "not every family has this size"),
        ("--slower=2", "--slower is for --asleep"),
        ("--json_output=no/such/folder/x.json", "its folder does not exist"),
        ("--html_output=no/such/folder", "the folder does not exist"),
        ("--strategies=no_such", "strategy 'no_such' is neither a schedule"),
        ("--num_devices=12", "10 layers cannot fill 12 stages"),
    ],
)
def test_flags_that_are_wrong(flag, message):
    assert_refused(compare(flag), message)
