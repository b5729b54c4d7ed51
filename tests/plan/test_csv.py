import re

import pytest
from hypothesis import given

from jaxptis.plan import Plan, Task, schedule_from_csv, schedule_to_csv
from jaxptis.plan.csv import placement_of
from tests.random_plans import plans


@given(plans())
def test_round_trip(plan: Plan) -> None:
    assert schedule_from_csv(schedule_to_csv(plan.schedule)) == plan.schedule
    assert placement_of(plan.schedule) == tuple(stage.device for stage in plan.stages)


def test_bubbles_and_whitespace_say_nothing() -> None:
    plain = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    spaced = " 0F0 ,0F1,,,0B0,  , 0B1,\n,1F0,1B0,\t1F1,1B1\n\n\n"
    quoted = plain.replace("1B0", '"1B0"')
    for text in spaced, spaced.replace("\n", "\r\n"), quoted, plain.rstrip():
        assert schedule_to_csv(schedule_from_csv(text)) == plain


def test_overlapped_tasks_stand_in_order() -> None:
    rows = schedule_from_csv("0F0,(0F3;3B1)OVERLAP_F_B,( 3F0 ; 0B12 ) OVERLAP_F_B")
    assert [str(task) for task in rows[0]] == ["0F0", "0F3", "3B1", "3F0", "0B12"]


def test_a_device_without_tasks() -> None:
    rows = ((Task(0, "F", 0),), (), (Task(1, "F", 0),), ())
    assert schedule_from_csv(schedule_to_csv(rows)) == rows


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("0F0,0X0", "row 1, cell 2", "'0X0'"),
        ("0F0\n1F0,,F1", "row 2, cell 3", "'F1'"),
        ("0F0,0SEND_F0", "row 1, cell 2", "'0SEND_F0'"),
        ("0F0,(0F1;0B0)OVERLAP", "row 1, cell 2", "'(0F1;0B0)OVERLAP'"),
        ("(0F1;0)OVERLAP_F_B", "row 1, cell 1", "'0'"),
        ("0F0 0B0", "row 1, cell 1", "'0F0 0B0'"),
    ],
)
def test_bad_cells(text: str, where: str, found: str) -> None:
    message = f"my.csv: {where}: bad task: found {found}, expected <stage><KIND><microbatch>"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        schedule_from_csv(text, source="my.csv")


@pytest.mark.parametrize("text", ["", "\n\n", " ,,\n"])
def test_no_task(text: str) -> None:
    with pytest.raises(ValueError, match=r"^schedule: no task found; write a row of tasks"):
        schedule_from_csv(text)


def test_placement() -> None:
    assert placement_of(schedule_from_csv("0F0,2F0\n\n1F0\n")) == (0, 2, 0)
    with pytest.raises(ValueError, match="stage 0 has tasks on devices 0 and 1, 0B0 among them"):
        placement_of(schedule_from_csv("0F0\n0B0\n"))
    with pytest.raises(ValueError, match="no task of stage 1, but of stage 2; number stages"):
        placement_of(schedule_from_csv("0F0,2F0\n"))
