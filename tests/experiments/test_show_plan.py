import html
import json

import pytest

from jaxptis.performance import Costs, LayerCost
from jaxptis.plan import Plan
from tests.experiments.program import assert_refused, run_program

F_S, B_S = 1.0, 2.0
PARAM_BYTES, INPUT_BYTES = 1_000_000_000, 500


def show_plan(*arguments):
    return run_program("show_plan", *arguments)


@pytest.fixture
def costs_file(tmp_path):
    """Write the costs of four equal layers, one of them with a name that HTML and rich read."""
    layers = [
        LayerCost(
            name=name,
            forward_s=F_S,
            backward_s=B_S,
            input_grad_s=B_S / 2,
            weight_grad_s=B_S / 2,
            input_bytes=INPUT_BYTES,
            param_bytes=PARAM_BYTES,
        )
        for name in ("embed", "[bold]a</script>", "b", "head")
    ]
    path = tmp_path / "<i>costs.json"
    Costs(tuple(layers), device="NVIDIA L4").save(path)
    return path


@pytest.mark.parametrize(
    ("model", "size", "first_lines"),
    [
        # The layers of the pattern, the embedding and the head; the published number of parameters.
        ("nemotron_h", "56B", "120 layers, 56,324,350,464 parameters"),
        # Two layers a block, the embedding and the head. With the block that predicts the token
        # after the next, V3 has what joins, and its embedding and its head twice.
        ("deepseek", "V3", "129 layers, 682,636,487,424 parameters"),
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


def test_a_plan_of_a_file_and_its_step(costs_file, tmp_path):
    """1F1B of equal stages takes (M + P - 1) times their work; device d waits for d forwards."""
    json_path, page_path = tmp_path / "step.json", tmp_path / "step.html"
    run = show_plan(
        f"--costs={costs_file}",
        "--strategy=1f1b",
        "--num_devices=4",
        "--num_microbatches=6",
        f"--json_output={json_path}",
        f"--html_output={page_path}",
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(json_path.read_text())
    assert figures["step_s"] == pytest.approx((6 + 4 - 1) * (F_S + B_S))
    for index, device in enumerate(figures["devices"]):
        assert device["busy_s"] == pytest.approx(6 * (F_S + B_S))
        assert device["bubble"] == pytest.approx(3 / 9)
        assert device["warm_up_s"] == pytest.approx(index * F_S)
        assert device["cool_down_s"] == pytest.approx(index * B_S)
        assert device["peak_parts"]["parameters"] == PARAM_BYTES
        assert device["peak_bytes"] == sum(device["peak_parts"].values())
        assert device["memory_bytes"] == 24 * 10**9
    assert figures["refusal"] is None and figures["bottleneck"]["devices"] == []
    plan = Plan.parse(figures["plan"])
    assert [stage.layers for stage in plan.stages] == [
        (layer["name"],) for layer in figures["layers"]
    ]
    rows = [line.split() for line in run.stdout.splitlines()]
    assert ["1", "1", "1", *["[bold]a</script>"] * 2, "cheap"] in rows
    (cells,) = [row for row in rows if row[:2] == ["0", "18"]]
    times = ["18 s", "33 %", "0 s", "9 s", "0 s", "0 s"]
    assert " ".join(cells) == f"0 {' '.join(times)} 954 MiB of 22.4 GiB parameters 954 MiB"
    assert "step 27 s; F forward, B backward" in run.stdout
    assert "No device holds up the others: each computes 67 % of the step" in run.stdout
    page = page_path.read_text()
    assert f"<title>{html.escape('<i>costs.json, 1f1b, predicted')}</title>" in page
    assert "a</script>" not in page


def test_both_ends_wait_for_a_transfer(costs_file, tmp_path):
    """With two layers a stage and two microbatches, so each of the four adds to the step."""
    path = tmp_path / "step.json"
    run = show_plan(
        f"--costs={costs_file}",
        "--strategy=gpipe",
        "--num_devices=2",
        "--num_microbatches=2",
        "--latency_s=0.25",
        f"--bytes_per_s={INPUT_BYTES / 0.5}",
        f"--json_output={path}",
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(path.read_text())
    assert figures["settings"]["latency_s"] == 0.25
    assert figures["step_s"] == pytest.approx(3 * 2 * (F_S + B_S) + 4 * 0.75)
    assert [each["exposed_s"] for each in figures["devices"]] == pytest.approx([4 * 0.75] * 2)


def test_what_does_not_fit_is_shown_and_refused(costs_file, tmp_path):
    costs, path = json.loads(costs_file.read_text()), tmp_path / "step.json"
    costs["kinds"]["large"] = {**next(iter(costs["kinds"].values())), "state_bytes": 30_000_000_000}
    costs["layers"]["b"] = "large"
    costs_file.write_text(json.dumps(costs))
    run = show_plan(f"--costs={costs_file}", "--strategy=1f1b", f"--json_output={path}")
    assert run.returncode == 1
    assert "step 33 s" in run.stdout
    assert run.stderr.startswith("device 2 needs 31,0")
    assert "but has 24,000,000,000" in run.stderr
    assert "optimizer state: give it fewer layers" in run.stderr and "Traceback" not in run.stderr
    assert json.loads(path.read_text())["refusal"] == run.stderr.strip()


def test_a_plan_of_a_model_for_a_device_that_is_not_here(tmp_path):
    path = tmp_path / "step.json"
    run = show_plan(
        "--sequence_length=16",
        "--device=NVIDIA H200",
        "--optimizer=sgd",
        "--strategy=zb-v",
        "--num_devices=2",
        f"--json_output={path}",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("10 layers, 803,968 parameters\n")
    figures = json.loads(path.read_text())
    assert figures["settings"]["device"] == "NVIDIA H200"
    parts = [device["peak_parts"] for device in figures["devices"]]
    assert sum(each["parameters"] for each in parts) == 4 * 803_968
    assert {each["optimizer state"] for each in parts} == {0}
    plan = Plan.parse(figures["plan"])
    assert [stage.device for stage in plan.stages] == [0, 1, 1, 0]
    assert plan.layers == tuple(layer["name"] for layer in figures["layers"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"strategy": "2f2b"}, "strategy '2f2b' is neither a schedule"),
        ({"num_devices": "8"}, "4 layers cannot fill 8 stages"),
        ({"costs": {"forward_s": -1}}, "forward_s of kind 'embed' is -1; use"),
        ({"costs": dict.fromkeys(("forward_s", "backward_s"), 0)}, "takes 0 s"),
    ],
)
def test_bad_input_is_refused_without_a_traceback(costs_file, change, complaint):
    if numbers := change.pop("costs", None):
        costs = json.loads(costs_file.read_text())
        next(iter(costs["kinds"].values())).update(numbers)
        costs_file.write_text(json.dumps(costs))
    given = {"costs": costs_file, "strategy": "1f1b", **change}
    run = show_plan(*(f"--{name}={value}" for name, value in given.items()))
    assert_refused(run, complaint)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("--model=llama2", "--size=56B"),
            "the model has no such size; use 7B, 13B, 70B, small, tiny",
        ),
        (("--costs=gone.json",), "there is no such file; write one"),
        (("--costs=setup.cfg", "--size=tiny"), "says what is planned; drop --model, --size"),
        (("--num_devices=2",), "only layers are shown; add it, or drop --num_devices"),
        (("--strategy=1f1b", "--html_output=step.png"), "let it end in .html"),
        (("--json_output=/no/such/folder/step.json",), "its folder does not exist"),
        (("tiny",), "belong to no flag"),
    ],
)
def test_a_bad_flag_is_named(arguments, complaint):
    run = show_plan(*arguments)
    assert run.returncode != 0
    assert complaint in run.stderr + run.stdout
