import json

import pytest

from jaxptis.cluster import Cluster
from jaxptis.performance import Costs, LayerCost, simulate
from jaxptis.plan import Plan
from tests.clusters import device
from tests.experiments.program import assert_refused, run_program

F_S, I_S, W_S = 1.0, 1.0, 1.0
PARAM_BYTES = 2**30
NUM_LAYERS, HEAD_TIMES = 7, 3


def run_plan(*arguments, **environment):
    return run_program("plan", *arguments, **environment)


@pytest.fixture
def costs_file(tmp_path):
    """Write the costs of layers, of which the last takes three times as long as the others."""
    layers = (
        LayerCost(
            name=f"layer{index}",
            forward_s=F_S * times,
            backward_s=(I_S + W_S) * times,
            input_grad_s=I_S * times,
            weight_grad_s=W_S * times,
            param_bytes=PARAM_BYTES,
        )
        for index in range(NUM_LAYERS)
        for times in [HEAD_TIMES if index == NUM_LAYERS - 1 else 1]
    )
    path = tmp_path / "costs.json"
    Costs(tuple(layers)).save(path)
    return path


def test_a_plan_its_certificate_and_what_others_take(costs_file, tmp_path):
    num_devices, num_microbatches = 3, 4
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("txt", "json", "html")}
    run = run_plan(
        f"--costs={costs_file}",
        f"--num_devices={num_devices}",
        f"--num_microbatches={num_microbatches}",
        "--time_limit_s=0.2",
        f"--plan_output={files['txt']}",
        f"--json_output={files['json']}",
        f"--html_output={files['html']}",
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(files["json"].read_text())
    plan, costs = Plan.load(files["txt"]), Costs.load(costs_file)
    assert plan.text() == figures["plan"]
    cluster = Cluster((device(),) * num_devices)
    assert figures["step_s"] == simulate(plan, costs, cluster, blocking=True).step_s
    # Nine layers' work, three for each device; and one device waits for the first forwards.
    least_s = (F_S + I_S + W_S) * num_microbatches * (NUM_LAYERS - 1 + HEAD_TIMES) / num_devices
    bound_s = figures["bounds"][0]["seconds"]
    assert least_s <= bound_s <= figures["step_s"]
    assert figures["gap"] == pytest.approx(figures["step_s"] / bound_s - 1)
    steps_s = {row["strategy"]: row["step_s"] for row in figures["strategies"]}
    assert {"mist", "adaptis", "best", "interleaved(partition=uniform)"} <= steps_s.keys()
    assert steps_s["best"] == min(step_s for step_s in steps_s.values() if step_s)
    for strategy in steps_s:
        assert strategy in run.stdout or steps_s[strategy] is None
    assert f"{bound_s * 1e3:.3f} ms" in run.stdout
    assert files["html"].read_text().startswith("<!doctype html>")


def test_a_terminal_has_a_bar_with_the_best_so_far(costs_file):
    arguments = f"--costs={costs_file}", "--num_devices=2", "--time_limit_s=0.2"
    assert "best so far" in run_plan(*arguments, FORCE_COLOR="1").stdout


def test_a_limit_that_no_plan_keeps_is_refused(costs_file):
    run = run_plan(f"--costs={costs_file}", "--num_devices=2", "--memory_limit_gib=2")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"{NUM_LAYERS * PARAM_BYTES:,}" in run.stderr.replace("\n", " ")


def test_a_strategy_that_is_not_known_is_refused(costs_file):
    run = run_plan(f"--costs={costs_file}", "--num_devices=2", "--strategy=bset")
    assert_refused(run, "did you mean 'best'?")
