from itertools import pairwise
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptis.cluster import DeviceSpec
from jaxptis.performance import Costs, LayerCost, Span, Timeline, roofline_s, simulate
from jaxptis.plan import Plan, StagePlan, Task
from jaxptis.schedules import schedule
from tests.random_plans import plans

# All times here are multiples of 1/64 s, which floats add exactly: results are compared with ==.
C = 1 / 64

family = pytest.mark.parametrize("name", ["gpipe", "1f1b"])
sizes = pytest.mark.parametrize(
    ("P", "M"), [(P, k * P) for P in (2, 4, 5, 6, 8) for k in (1, 2, 3, 4)]
)


def _plan(name: str, P: int, M: int) -> Plan:
    stages = (StagePlan(layers=(f"layer{stage}",), device=stage) for stage in range(P))
    rows = schedule(name, num_devices=P, num_microbatches=M)
    return Plan(stages=tuple(stages), schedule=rows)


def _costs(
    plan: Plan,
    forward_s: list[float],
    backward_s: list[float],
    input_grad_s: list[float] | None = None,
    weight_grad_s: list[float] | None = None,
) -> Costs:
    """Return costs by layer; a split backward costs nothing where it is not given."""
    free = [0.0] * len(plan.layers)
    columns = zip(
        plan.layers,
        forward_s,
        backward_s,
        input_grad_s or free,
        weight_grad_s or free,
        strict=True,
    )
    return Costs(
        tuple(
            LayerCost(name=n, forward_s=f, backward_s=b, input_grad_s=i, weight_grad_s=w)
            for n, f, b, i, w in columns
        )
    )


def _even(plan: Plan, forward_s: float = 1.0, backward_s: float = 2.0) -> Costs:
    num_layers = len(plan.layers)
    return _costs(plan, [forward_s] * num_layers, [backward_s] * num_layers)


@family
@sizes
@pytest.mark.parametrize(("F", "B"), [(1.0, 2.0), (1.0, 1.0), (2.0, 3.5)])
def test_even_stages(name: str, P: int, M: int, F: float, B: float) -> None:
    """The closed form of GPipe and 1F1B: (M + P - 1)(F + B)."""
    plan = _plan(name, P, M)
    timeline = simulate(plan, _even(plan, F, B))
    assert timeline.step_s == (M + P - 1) * (F + B)
    assert timeline.busy_s == (M * (F + B),) * P
    assert timeline.bubble == pytest.approx([(P - 1) / (M + P - 1)] * P)


@sizes
def test_1f1b_with_latency(P: int, M: int) -> None:
    """The latency is paid in the steady state too: c (2 (P - 1) M / P + 2 P - 4)."""
    plan = _plan("1f1b", P, M)
    latency_s = C * (2 * (P - 1) * (M // P) + 2 * P - 4)
    assert simulate(plan, _even(plan), C).step_s == (M + P - 1) * 3 + latency_s


@sizes
def test_gpipe_with_latency(P: int, M: int) -> None:
    """The latency is paid once on the way there and once on the way back."""
    plan = _plan("gpipe", P, M)
    assert simulate(plan, _even(plan), C).step_s == (M + P - 1) * 3 + 2 * (P - 1) * C


_SECONDS = st.integers(0, 640).map(lambda ticks: ticks * C)


@given(st.data(), st.integers(1, 6), st.integers(1, 9))
def test_gpipe_of_uneven_stages(data: st.DataObject, P: int, M: int) -> None:
    """A flow shop there and a flow shop back: sum + (M - 1) max of each."""
    plan = _plan("gpipe", P, M)
    draw = st.lists(_SECONDS, min_size=P, max_size=P)
    forward_s, backward_s = data.draw(draw), data.draw(draw)
    step_s = simulate(plan, _costs(plan, forward_s, backward_s)).step_s
    assert step_s == sum(
        sum(seconds) + (M - 1) * max(seconds) for seconds in (forward_s, backward_s)
    )


def _relax(plan: Plan, costs: Costs, transfer_s: float) -> dict[Task, tuple[float, float]]:
    """Compute starts and ends a second way: raise every start until no constraint is broken."""
    ranges = [range(*bounds) for bounds in pairwise(plan.boundaries)]
    device_of = [stage.device for stage in plan.stages]
    before: dict[Task, list[Task]] = {}
    for row in plan.schedule:
        for index, task in enumerate(row):
            s, kind, m = task.stage, task.kind, task.microbatch
            before[task] = list(row[index - 1 : index]) if index else []
            if kind == "F" and s > 0:
                before[task].append(Task(s - 1, "F", m))
            if kind in "BI":
                before[task].append(Task(s, "F", m))
            if kind in "BI" and s + 1 < plan.num_stages:
                whole, split = Task(s + 1, "B", m), Task(s + 1, "I", m)
                before[task].append(whole if any(whole in row for row in plan.schedule) else split)
            if kind == "W":
                before[task].append(Task(s, "I", m))

    columns = {
        "F": [layer.forward_s for layer in costs.layers],
        "B": [layer.backward_s for layer in costs.layers],
        "I": [layer.input_grad_s for layer in costs.layers],
        "W": [layer.weight_grad_s for layer in costs.layers],
    }

    def end_s(task: Task) -> float:
        return start_s[task] + sum(columns[task.kind][index] for index in ranges[task.stage])

    start_s = dict.fromkeys(before, 0.0)
    changed = True
    while changed:
        changed = False
        for task, others in before.items():
            for other in others:
                far = device_of[other.stage] != device_of[task.stage]
                arrival_s = end_s(other) + (transfer_s if far else 0.0)
                if arrival_s > start_s[task]:
                    start_s[task], changed = arrival_s, True
    return {task: (start_s[task], end_s(task)) for task in before}


@given(plans(), st.data())
def test_random_plans(plan: Plan, data: st.DataObject) -> None:
    draw = st.lists(_SECONDS, min_size=len(plan.layers), max_size=len(plan.layers))
    costs = _costs(plan, *(data.draw(draw) for _ in "FBIW"))
    transfer_s = data.draw(_SECONDS)
    for each in plan, plan.forward_only():
        timeline = simulate(each, costs, transfer_s)
        spans = [span for row in timeline.spans for span in row]
        assert [tuple(span.task for span in row) for row in timeline.spans] == [*each.schedule]
        expected = _relax(each, costs, transfer_s)
        assert {span.task: (span.start_s, span.end_s) for span in spans} == expected
        assert timeline.step_s == max(end for _, end in expected.values())


def test_a_layer_more_is_time_more() -> None:
    plan = Plan.parse(
        "jaxptis plan 1\n"
        "stage 0 on device 0\n  a\n  b\nstage 1 on device 1\n  c\n"
        "device 0: 0F0 0B0\ndevice 1: 1F0 1B0\n"
    )
    timeline = simulate(plan, _costs(plan, [1, 2, 4], [8, 16, 32]), transfer_s=0.5)
    assert timeline == Timeline(
        (
            (
                Span(task=Task(0, "F", 0), start_s=0, end_s=3),
                Span(task=Task(0, "B", 0), start_s=40, end_s=64),
            ),
            (
                Span(task=Task(1, "F", 0), start_s=3.5, end_s=7.5),
                Span(task=Task(1, "B", 0), start_s=7.5, end_s=39.5),
            ),
        )
    )
    assert (timeline.step_s, timeline.busy_s) == (64, (27, 36))
    assert timeline.bubble == (37 / 64, 28 / 64)
    assert timeline.text() == (
        "step 64000.000 ms\n"
        "\n"
        "device 0: busy 27000.000 ms, bubble 57.8%\n"
        "         0.000     3000.000  0F0\n"
        "     40000.000    64000.000  0B0\n"
        "\n"
        "device 1: busy 36000.000 ms, bubble 43.8%\n"
        "      3500.000     7500.000  1F0\n"
        "      7500.000    39500.000  1B0\n"
    )


def test_one_device_has_no_bubble_and_no_transfer() -> None:
    plan = Plan.parse(
        "jaxptis plan 1\nstage 0 on device 0\n  a\nstage 1 on device 0\n  b\n"
        "device 0: 0F0 1F0 1B0 0B0\ndevice 1:\n"
    )
    timeline = simulate(plan, _even(plan), transfer_s=9.0)
    assert (timeline.step_s, timeline.bubble) == (6.0, (0.0, 1.0))


def test_nothing_takes_no_time() -> None:
    plan = _plan("1f1b", 2, 2)
    timeline = simulate(plan, _even(plan, 0.0, 0.0))
    assert (timeline.step_s, timeline.bubble) == (0.0, (0.0, 0.0))


def test_costs_of_another_model() -> None:
    plan = _plan("gpipe", 2, 1)
    with pytest.raises(ValueError, match=r"layer 1 is 'layer1' in the plan \(2 layers\) and None"):
        simulate(plan, Costs(_even(plan).layers[:1]))
    with pytest.raises(ValueError, match=r"layer 0 is 'layer0' in the plan .* and 'layer1' in"):
        simulate(plan, Costs(_even(plan).layers[::-1]))


@pytest.mark.parametrize("transfer_s", [-1.0, inf, nan])
def test_bad_transfer(transfer_s: float) -> None:
    plan = _plan("gpipe", 2, 1)
    with pytest.raises(ValueError, match=f"transfer_s is {transfer_s}; use finite seconds"):
        simulate(plan, _even(plan), transfer_s)


def test_a_task_costs_what_its_layers_do() -> None:
    plan = _plan("gpipe", 3, 1)
    costs = _costs(plan, [1, 2, 4], [8, 16, 32], [64, 128, 256], [512, 1024, 2048])
    assert [costs.task_s(range(1, 3), kind) for kind in "FBIW"] == [6, 48, 384, 3072]
    with pytest.raises(ValueError, match="task kind 'X' is not known; use one of F, B, I, W"):
        costs.task_s(range(1), "X")


def test_a_split_backward() -> None:
    """The gradient leaves after I, and W fills the hole; B's own figure plays no part."""
    plan = Plan.parse(
        "jaxptis plan 1\nstage 0 on device 0\n  a\nstage 1 on device 1\n  b\n"
        "device 0: 0F0 0F1 0B0 0B1\ndevice 1: 1F0 1I0 1F1 1W0 1I1 1W1\n"
    )
    timeline = simulate(plan, _costs(plan, [1, 1], [8, 99], [99, 2], [99, 4]), transfer_s=0.5)
    starts = [[(str(span.task), span.start_s) for span in row] for row in timeline.spans]
    assert starts == [
        [("0F0", 0), ("0F1", 1), ("0B0", 5), ("0B1", 13)],
        [("1F0", 1.5), ("1I0", 2.5), ("1F1", 4.5), ("1W0", 5.5), ("1I1", 9.5), ("1W1", 11.5)],
    ]
    assert timeline.step_s == 21


@pytest.mark.parametrize("what", ["forward_s", "backward_s", "input_grad_s", "weight_grad_s"])
@pytest.mark.parametrize("seconds", [-1.0, inf, nan])
def test_bad_layer_cost(what: str, seconds: float) -> None:
    good = {"forward_s": 1.0, "backward_s": 2.0, "input_grad_s": 1.0, "weight_grad_s": 1.0}
    with pytest.raises(ValueError, match=f"{what} of layer 'mlp' is {seconds}; use finite"):
        LayerCost(name="mlp", **{**good, what: seconds})


def test_roofline() -> None:
    device = DeviceSpec(kind="x", flops_per_s=100.0, bytes_per_s=10.0)
    assert roofline_s(1000.0, 10.0, device) == 10.0  # bound by compute
    assert roofline_s(100.0, 50.0, device) == 5.0  # bound by memory
    assert roofline_s(0.0, 0.0, device) == 0.0
