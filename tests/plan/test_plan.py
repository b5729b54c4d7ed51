import re
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptis.plan import Plan, Schedule, StagePlan, Task
from jaxptis.plan.order import execution_order, needs
from tests.random_plans import plans


def _schedule(*rows: str) -> Schedule:
    return tuple(tuple(map(Task.parse, row.split())) for row in rows)


def _plan(*rows: str, devices: tuple[int, ...] = (0, 1)) -> Plan:
    stages = (StagePlan(layers=(f"layer{s}",), device=device) for s, device in enumerate(devices))
    return Plan(stages=tuple(stages), schedule=_schedule(*rows))


def _error(*rows: str, devices: tuple[int, ...] = (0, 1)) -> str:
    with pytest.raises(ValueError) as error:
        _plan(*rows, devices=devices)
    return str(error.value)


@given(st.integers(0, 99), st.sampled_from("FBIW"), st.integers(0, 99))
def test_task_text_round_trip(stage: int, kind: str, microbatch: int) -> None:
    task = Task(stage, kind, microbatch)
    assert str(task) == f"{stage}{kind}{microbatch}"
    assert Task.parse(str(task)) == task


@pytest.mark.parametrize(
    "text",
    ["", "0F", "F0", "0X3", "0f3", "-1F0", "0F-1", "0F3 ", "0F3F", "\u0660F0", "0F1234567890"],
)
def test_malformed_task(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"found {text!r}")):
        Task.parse(text)


@pytest.mark.parametrize(
    ("stage", "kind", "microbatch", "found"),
    [
        (0, "X", 0, "'X'"),
        (0, "FB", 0, "'FB'"),
        (0, "", 0, "''"),
        (-1, "F", 0, "-1F0"),
        (0, "F", -1, "0F-1"),
    ],
)
def test_impossible_task(stage: int, kind: str, microbatch: int, found: str) -> None:
    with pytest.raises(ValueError, match=re.escape(found)):
        Task(stage, kind, microbatch)


def test_properties() -> None:
    plan = Plan(
        stages=(
            StagePlan(layers=("embed", "attention"), device=1),
            StagePlan(layers=("mlp",), device=0),
            StagePlan(layers=("norm", "head"), device=1),
        ),
        schedule=_schedule("1F0 1F1 1B0 1I1 1W1", "0F0 0F1 2F0 2B0 2F1 2B1 0B0 0B1"),
    )
    assert (plan.num_devices, plan.num_stages, plan.num_microbatches) == (2, 3, 2)
    assert plan.layers == ("embed", "attention", "mlp", "norm", "head")
    assert plan.boundaries == (0, 2, 3, 5)


def test_plan_is_a_value() -> None:
    plan = _plan("0F0 0B0", "1F0 1B0")
    assert hash(plan) == hash(_plan("0F0 0B0", "1F0 1B0"))
    with pytest.raises(FrozenInstanceError):
        plan.schedule = ()  # type: ignore[misc]


def test_unknown_recompute() -> None:
    plan = _plan("0F0 0B0", "1F0 1B0")
    message = "stage 0 is to recompute True; use one of none, cheap, all"
    with pytest.raises(ValueError, match=message):
        replace(plan, stages=(replace(plan.stages[0], recompute=True),))  # type: ignore[arg-type]


def test_device_without_a_stage_idles() -> None:
    assert _plan("0F0 0B0", "1F0 1B0", "").num_devices == 3


def test_forward_only() -> None:
    plan = _plan("0F0 0F1 0B0 0B1", "1F0 1I0 1F1 1W0 1B1").forward_only()
    assert plan.schedule == _schedule("0F0 0F1", "1F0 1F1")
    assert plan.forward_only() == plan


@given(plans())
def test_random_plans_have_a_forward(plan: Plan) -> None:
    forward = plan.forward_only()
    assert forward.stages == plan.stages
    assert forward.num_microbatches == plan.num_microbatches
    assert sum(map(len, forward.schedule)) == plan.num_stages * plan.num_microbatches


@given(plans())
def test_execution_order_respects_rows_and_needs(plan: Plan) -> None:
    order = execution_order(plan.schedule)
    place = {task: index for index, task in enumerate(order)}
    assert sorted(map(str, order)) == sorted(str(task) for row in plan.schedule for task in row)
    for row in plan.schedule:
        assert [place[task] for task in row] == sorted(place[task] for task in row)
    for task in order:
        assert all(place[need] < place[task] for need in needs(task, place))


def test_needs() -> None:
    tasks = set(map(Task.parse, ["0F0", "0I0", "0W0", "1F0", "1B0", "2F0", "2I0", "2W0"]))
    found = {str(t): " ".join(map(str, needs(t, tasks))) for t in tasks}
    assert found == {
        "0F0": "", "1F0": "0F0", "2F0": "1F0",
        "2I0": "2F0", "1B0": "1F0 2I0", "0I0": "0F0 1B0",
        "0W0": "0I0", "2W0": "2I0",
    }  # fmt: skip


@given(plans(), st.randoms(use_true_random=False))
def test_any_task_missing_is_named(plan: Plan, rng: Random) -> None:
    gone = rng.choice([task for row in plan.schedule for task in row])
    rows = tuple(tuple(task for task in row if task != gone) for row in plan.schedule)
    left = [task for row in rows for task in row]
    last_of_microbatch = gone.microbatch not in {task.microbatch for task in left}
    no_backward_left = all(task.kind == "F" for task in left)
    if last_of_microbatch or no_backward_left:  # what is left is complete, or empty
        return
    with pytest.raises(ValueError, match=rf"\b{gone}\b"):
        replace(plan, schedule=rows)


@given(plans(), st.randoms(use_true_random=False))
def test_any_task_twice_is_named(plan: Plan, rng: Random) -> None:
    device = rng.choice([device for device, row in enumerate(plan.schedule) if row])
    rows = [list(row) for row in plan.schedule]
    twice = rng.choice(rows[device])
    rows[device].insert(rng.randint(0, len(rows[device])), twice)
    with pytest.raises(ValueError, match=rf"device {device} runs {twice} twice"):
        replace(plan, schedule=tuple(map(tuple, rows)))


@given(plans(), st.randoms(use_true_random=False))
def test_any_task_on_another_device_is_named(plan: Plan, rng: Random) -> None:
    source = rng.choice([device for device, row in enumerate(plan.schedule) if row])
    rows = [list(row) for row in plan.schedule] + [[]]
    moved = rows[source].pop(rng.randrange(len(rows[source])))
    rows[-1].append(moved)
    message = f"device {len(rows) - 1} runs {moved}, but stage {moved.stage} is on device {source}"
    with pytest.raises(ValueError, match=message):
        replace(plan, schedule=tuple(map(tuple, rows)))


@given(plans(), st.randoms(use_true_random=False))
def test_any_order_runs_or_is_refused(plan: Plan, rng: Random) -> None:
    """Compares the verdict with Kahn's algorithm on the graph of needs and rows."""
    rows = [list(row) for row in plan.schedule]
    for row in rows:
        rng.shuffle(row)
    tasks = {task for row in rows for task in row}
    before = {task: set(needs(task, tasks)) for task in tasks}
    for row in rows:
        for first, second in pairwise(row):
            before[second].add(first)
    while ready := [task for task, waits in before.items() if not waits & before.keys()]:
        for task in ready:
            del before[task]
    schedule = tuple(map(tuple, rows))
    if before:
        with pytest.raises(ValueError, match=r"deadlock|which it needs"):
            replace(plan, schedule=schedule)
    else:
        replace(plan, schedule=schedule)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0B0 0F0", "device 0 runs 0B0 before 0F0, which it needs; move 0F0 up"),
        ("0F0 0W0 0I0", "device 0 runs 0W0 before 0I0, which it needs; move 0I0 up"),
        ("0I0 0F0 0W0", "device 0 runs 0I0 before 0F0, which it needs; move 0F0 up"),
    ],
)
def test_order_inside_a_stage(row: str, message: str) -> None:
    assert _error(row, devices=(0,)) == message


def test_order_of_stages_on_one_device() -> None:
    message = _error("1F0 0F0 1B0 0B0", devices=(0, 0))
    assert message == "device 0 runs 1F0 before 0F0, which it needs; move 0F0 up"


def test_deadlock_of_two_devices_names_the_circle() -> None:
    message = _error("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")
    assert message.startswith(
        "deadlock: device 0 waits at 0B0 for 1B0; device 1 waits at 1F1 for 0F1; move"
    )


def test_deadlock_names_only_the_circle() -> None:
    """Devices 1 and 2 are in the circle; device 0 waits for it and is not."""
    message = _error(
        "0F0 0F1 0B0 0B1",
        "1F0 1B0 1F1 1B1",
        "2F0 2F1 2B0 2B1",
        devices=(0, 1, 2),
    )
    assert "device 1 waits at 1B0 for 2B0; device 2 waits at 2F1 for 1F1" in message
    assert "device 0" not in message


def test_backward_waits_for_the_input_gradient_only() -> None:
    plan = _plan("0F0 0F1 0B0 0B1", "1F0 1I0 1F1 1I1 1W0 1W1")
    assert plan.num_microbatches == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0F0 0F1 0B0 0B1", "1F0 1B0"), "1F1 is missing; add it to the row of device 1"),
        (("0F1 0B1", "1F1 1B1"), "0F0 is missing; add it to the row of device 0"),
        (("0F0 0B0", ""), "1F0 is missing; add it to the row of device 1"),
        (("0F0 0F999999999", "1F0"), "0F1 is missing"),
        (("0F0 0B0", "1F0"), "microbatch 0 in stage 1 is missing"),
        (("0F0", "1F0 1B0"), "microbatch 0 in stage 0 is missing"),
        (
            ("0F0 0I0", "1F0 1B0"),
            "microbatch 0 in stage 0 is 0I0; device 0 must run either 0B0, or",
        ),
        (("0F0 0W0", "1F0 1B0"), "microbatch 0 in stage 0 is 0W0;"),
        (("0F0 0B0 0I0 0W0", "1F0 1B0"), "is 0B0 and 0I0 and 0W0;"),
        (
            ("0F0 0B0", "1F0 1B0 1W0"),
            "is 1B0 and 1W0; device 1 must run either 1B0, or 1I0 and 1W0",
        ),
        (("", ""), "the schedule has no tasks"),
        (("0F0 0B0", "1F0 1B0 2F0"), "device 1 runs 2F0, but the plan has 2 stages"),
    ],
)
def test_incomplete(rows: tuple[str, ...], message: str) -> None:
    assert message in _error(*rows)


def test_no_stages() -> None:
    with pytest.raises(ValueError, match="no stages"):
        Plan(stages=(), schedule=((),))


@pytest.mark.parametrize("device", [-1, 2])
def test_device_out_of_range(device: int) -> None:
    message = _error("0F0 0B0", "1F0 1B0", devices=(0, device))
    assert f"stage 1 is on device {device}, but the schedule has rows for 2 devices" in message


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "stage 1 has no layers"),
        (("a",), "layer 'a' stands twice, in stage 0 and in stage 1"),
        (("b", "b"), "layer 'b' stands twice, in stage 1 and in stage 1"),
        (("b c",), "layer 'b c' of stage 1 cannot be written"),
        (("",), "layer '' of stage 1 cannot be written"),
        (("#b",), "layer '#b' of stage 1 cannot be written"),
        (("b\n",), r"layer 'b\n' of stage 1 cannot be written"),
    ],
)
def test_bad_layers(layers: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan(
            stages=(StagePlan(layers=("a",), device=0), StagePlan(layers=layers, device=0)),
            schedule=_schedule("0F0 1F0"),
        )
