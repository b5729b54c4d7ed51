"""Plans and strategies that do not fit are refused: why, the numbers, and what to change.

And before it takes minutes to find what the layers of a large model cost.
"""

import re
from pathlib import Path

import pytest

from jaxptis import compile as compiling
from jaxptis.plan import Plan, StagePlan, schedule_to_csv
from jaxptis.schedules import FAMILIES, schedule
from tests.small_models import make_batch, make_params
from tests.small_pipelines import make_pipelined, refuse


@pytest.fixture(autouse=True)
def costs_are_not_asked_for(monkeypatch):
    def choose_costs(*args):
        pytest.fail("asked what the layers cost")

    monkeypatch.setattr(compiling, "choose_costs", choose_costs)


def plain_plan(*layers, num_microbatches=2):
    """Return a plan with one stage a device."""
    return Plan(
        stages=tuple(StagePlan(layers=names, device=d) for d, names in enumerate(layers)),
        schedule=schedule("1f1b", num_devices=len(layers), num_microbatches=num_microbatches),
    )


def test_too_few_devices_for_a_plan():
    plan = plain_plan(("first",), ("blocks/0",), ("head",))
    refuse(
        "the plan needs 3 devices, but 2 are given; pass more devices or use another plan",
        make_pipelined(strategy=plan),
    )


def test_plan_of_another_model():
    refuse(
        "the plan is for another model: its layer 2 is 'tail', the model's is 'head' "
        r"\(the plan has 3 layers, the model 3\); use a plan of this model",
        make_pipelined(strategy=plain_plan(("first", "blocks/0"), ("tail",))),
    )
    refuse(
        r"its layer 2 is None, the model's is 'head' \(the plan has 2 layers, the model 3\)",
        make_pipelined(strategy=plain_plan(("first",), ("blocks/0",))),
    )


def test_plan_of_other_microbatches():
    plan = plain_plan(("first", "blocks/0"), ("head",), num_microbatches=4)
    refuse(
        "the plan has 4 microbatches, but num_microbatches is 2; make them equal",
        make_pipelined(strategy=plan),
    )


def test_plan_without_a_backward():
    plan = plain_plan(("first", "blocks/0", "head")).forward_only()
    with pytest.raises(ValueError, match="the plan has forwards only; give every stage"):
        make_pipelined(strategy=plan).value_and_grad(make_params(1), make_batch())


@pytest.mark.parametrize(
    ("old", "new", "place", "wrong"),
    [
        ("0F1", "0G1", "9:15", "bad task: found '0G1', expected <stage><KIND><microbatch>"),
        ("plan 1", "plan 9", "1:14", "unknown version: found '9'"),
        ("on device 1", "at device 1", "6:9", "bad stage line: found 'at'"),
    ],
)
def test_malformed_plan_file(tmp_path, old, new, place, wrong):
    text = plain_plan(("first", "blocks/0"), ("head",)).text()
    path = tmp_path / "my.plan"
    path.write_text(text.replace(old, new, 1))
    line, column = map(int, place.split(":"))
    found = re.search(r"found '(.*?)'", wrong)[1]
    # The numbers are those of the planted word.
    line_text = path.read_text().splitlines()[line - 1]
    assert line_text[column - 1 :].startswith(found)
    refuse(
        rf"^{re.escape(str(path))}:{place}: {re.escape(wrong)}",
        make_pipelined(strategy=str(path)),
    )


def test_strategy_that_is_not_known():
    refuse(
        f"strategy '1f1p' is neither a schedule \\({', '.join(FAMILIES)}, best, "
        "adaptis, mist\\) nor the path of "
        r"a plan file that can be read \(.*No such file.*\); did you mean '1f1b'\? "
        r"change it, or write the file with plan.save\(path\)",
        make_pipelined(strategy="1f1p"),
    )
    refuse(r"did you mean 'v-half'\?", make_pipelined(strategy="v_half(x=2)"))


def test_schedule_of_too_many_stages():
    refuse("3 layers cannot fill 4 stages", make_pipelined(strategy="interleaved"))


def test_schedule_in_a_file_of_too_many_stages(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text(schedule_to_csv(schedule("interleaved", num_devices=2, num_microbatches=2)))
    refuse("3 layers cannot fill its 4 stages", make_pipelined(strategy=path))


@pytest.mark.parametrize("strategy", ["adaptis", "mist"])
def test_planner_that_leaves_no_device_empty(strategy):
    refuse(
        "3 layers cannot fill 4 devices; pass 3 or fewer",
        make_pipelined(strategy=strategy, num_devices=4),
    )


def test_only_the_first_process_needs_the_file_of_a_plan(monkeypatch):
    class OfAnother:
        """The processes, as another than the first has them, if the first finds no fault."""

        def __init__(self, devices):
            pass

        def check_same(self, what, text):
            assert (what, text) == ("layers and microbatches", "2 first head")

        def of_first(self, make):
            return ""

    options = make_pipelined(strategy="no/such/file").options
    with pytest.raises(ValueError, match="no/such/file"):
        compiling._check_strategy(options, ["first", "head"])
    monkeypatch.setattr(compiling, "Processes", OfAnother)
    compiling._check_strategy(options, ["first", "head"])


def test_schedule_of_too_few_microbatches():
    refuse(
        "2 microbatches are too few for 'dualpipe-v' on 2 devices",
        make_pipelined(strategy="dualpipe-v"),
        make_params(2),
    )


@pytest.mark.parametrize("strategy", [Path(__file__).parent, 42, None])
def test_strategy_that_is_neither_a_name_nor_a_file(strategy):
    refuse(f"strategy.*{re.escape(str(strategy))}", make_pipelined(strategy=strategy))
