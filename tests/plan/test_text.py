import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptis.plan import Plan, StagePlan
from jaxptis.plan.text import from_text, to_text
from tests.random_plans import plans

TEXT = """\
jaxptis plan 1

stage 0 on device 0
  wte#2
  layers/0/attention
stage 1 on device 1
  layers/0/mlp

device 0: 0F0 0F1 0B0 0B1
device 1: 1F0 1I0 1F1 1B1 1W0
"""
LINES = TEXT.splitlines()


def test_golden() -> None:
    plan = from_text(TEXT)
    assert plan.stages == (
        StagePlan(layers=("wte#2", "layers/0/attention"), device=0),
        StagePlan(layers=("layers/0/mlp",), device=1),
    )
    assert [" ".join(map(str, row)) for row in plan.schedule] == [
        "0F0 0F1 0B0 0B1",
        "1F0 1I0 1F1 1B1 1W0",
    ]
    assert to_text(plan) == TEXT


@given(plans())
def test_round_trip(plan: Plan) -> None:
    assert Plan.parse(plan.text()) == plan
    assert str(plan) == plan.text() == to_text(plan)


_NAMES = st.text(min_size=1).filter(lambda name: name.split() == [name] and name[0] != "#")


@given(st.lists(_NAMES, min_size=1, unique=True))
def test_round_trip_of_any_layer_name(names: list[str]) -> None:
    plan = Plan.parse(TEXT)
    stages = (StagePlan(layers=tuple(f"0{name}" for name in names), device=0), plan.stages[1])
    plan = replace(plan, stages=(replace(stages[0], layers=tuple(names)), stages[1]))
    assert from_text(to_text(plan)) == plan


def test_layers_named_like_the_words_of_the_format() -> None:
    names = ("stage", "device", "jaxptis", "0:", "0F0", "a#", "on")
    plan = Plan.parse(TEXT)
    plan = replace(plan, stages=(StagePlan(layers=names, device=0), plan.stages[1]))
    assert Plan.parse(plan.text()) == plan


@pytest.mark.parametrize(
    "text",
    [
        "# a plan\n" + TEXT + "# the end",
        TEXT.replace("\n", " # why\n"),
        TEXT.replace("\n", "\t#why\n"),
        TEXT.replace("  ", "\t"),
        TEXT.replace(" ", "  \t"),
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\n\n \n"),
        TEXT.rstrip("\n"),
        "\n".join([*LINES[:8], LINES[9], LINES[8]]),  # device rows in any order
        TEXT.replace("0F1", "00F01"),
    ],
    ids=["comments", "trailing", "tab", "tabs", "spaces", "crlf", "blank", "eof", "rows", "zeros"],
)
def test_what_a_person_may_write(text: str) -> None:
    assert from_text(text).text() == TEXT


def test_moving_a_layer_is_moving_a_line() -> None:
    lines = [*LINES[:4], LINES[5], LINES[4], *LINES[6:]]
    assert Plan.parse("\n".join(lines)).boundaries == (0, 1, 3)
    assert Plan.parse(TEXT).boundaries == (0, 2, 3)


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    plan = Plan.parse(TEXT)
    plan.save(path)
    assert path.read_text(encoding="utf-8") == TEXT
    assert Plan.load(path) == Plan.load(str(path)) == plan


def test_load_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "plan.txt"
    path.write_text(TEXT.replace("0B1", "0X1"))
    with pytest.raises(ValueError, match=re.escape(f"{path}:9:23: bad task: found '0X1'")):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_empty(text: str) -> None:
    end = len(text.splitlines()) + 1
    with pytest.raises(ValueError, match=f"^plan:{end}:1: not a plan: found the end, expected"):
        from_text(text)


_STAGE = "'stage <number> on device <number>'"


@pytest.mark.parametrize(
    ("line", "written", "message"),
    [
        (1, "jaxpts plan 1", "1:1: not a plan: found 'jaxpts', expected 'jaxptis' of the first"),
        (1, "jaxptis", "1:8: not a plan: found the end, expected 'plan'"),
        (1, "jaxptis plan", "1:13: unknown version: found the end, expected '1'"),
        (1, "jaxptis plan 2", "1:14: unknown version: found '2', expected '1'"),
        (1, "jaxptis plan 1 x", "1:16: too much on the line: found 'x', expected the end"),
        (1, "", "3:1: not a plan: found 'stage', expected 'jaxptis'"),
        (2, "stages 0", "2:1: unknown line: found 'stages', expected 'stage', 'device' or an"),
        (2, " embed", f"2:2: layer outside a stage: found 'embed', expected {_STAGE}"),
        (3, "stage", "3:6: bad stage number: found the end, expected a whole number"),
        (3, "stage x on device 0", "3:7: bad stage number: found 'x', expected a whole number"),
        (3, "stage -1 on device 0", "3:7: bad stage number: found '-1', expected a whole number"),
        (3, "stage 1 on device 0", "3:7: stage out of order: found '1', expected 0"),
        (6, "stage 0 on device 1", "6:7: stage out of order: found '0', expected 1"),
        (3, "stage 0", f"3:8: bad stage line: found the end, expected 'on' of {_STAGE}"),
        (3, "stage 0 at device 0", f"3:9: bad stage line: found 'at', expected 'on' of {_STAGE}"),
        (
            3,
            "stage 0 on gpu 0",
            f"3:12: bad stage line: found 'gpu', expected 'device' of {_STAGE}",
        ),
        (3, "stage 0 on device", "3:18: bad device number: found the end, expected a whole"),
        (3, "stage 0 on device a", "3:19: bad device number: found 'a', expected a whole number"),
        (
            3,
            "stage 0 on device 0 x",
            "3:21: bad stage line: found 'x', expected 'recompute' or the end",
        ),
        (
            3,
            "stage 0 on device 0 recompute",
            "3:30: bad stage line: found the end, expected one of none, cheap, all",
        ),
        (3, "stage 0 on device 0 recompute all x", "3:35: too much on the line: found 'x', expect"),
        (3, "stage 0 on device 2", "3:19: stage on a device without a row: found '2', expected 0"),
        (4, "embed", "4:1: unknown line: found 'embed', expected 'stage', 'device' or an indented"),
        (4, "\twte x", "4:6: too much on the line: found 'x', expected the end of the line"),
        (7, "", "6:19: stage without layers: found '1', expected an indented layer"),
        (7, "  wte#2", "7:3: layer twice: found 'wte#2', expected it only at plan:4:3"),
        (5, "  wte#2", "5:3: layer twice: found 'wte#2', expected it only at plan:4:3"),
        (9, "device", "9:7: bad device row: found the end, expected a number and a colon"),
        (9, "device 0", "9:8: bad device row: found '0', expected a number and a colon"),
        (9, "device 0 0F0", "9:8: bad device row: found '0', expected a number and a colon"),
        (9, "device 0:0F0", "9:8: bad device row: found '0:0F0', expected a number and a colon"),
        (9, "device x: 0F0", "9:8: bad device number: found 'x', expected a whole number"),
        (9, "device : 0F0", "9:8: bad device number: found the end, expected a whole number"),
        (9, "device 0: 0F0 0X3 0B0", "9:15: bad task: found '0X3', expected <stage><KIND>"),
        (9, "device 0: 0F0,0B0", "9:11: bad task: found '0F0,0B0', expected <stage><KIND>"),
        (9, "device 0: 0F0 1234567890F0", "9:15: bad task: found '1234567890F0', expected"),
        (10, "device 0: 1F0", "10:8: device row twice: found '0:', expected every device once"),
        (9, "", "10:8: row of device 0 missing: found '1:', expected '0:' too"),
        (10, "device 2: 1F0", "10:8: row of device 1 missing: found '2:', expected '1:' too"),
        (10, "device 999999999: 1F0", "10:8: row of device 1 missing: found '999999999:'"),
        (10, "", "6:19: stage on a device without a row: found '1', expected 0 to 0"),
        (10, LINES[9] + "\n  head", "11:3: layer outside a stage: found 'head', expected 'stage"),
    ],
)
def test_malformed(line: int, written: str, message: str) -> None:
    lines = [*LINES]
    lines[line - 1] = written
    with pytest.raises(ValueError, match="^" + re.escape(f"plan:{message}")):
        from_text("\n".join(lines))


def test_nothing_but_a_header() -> None:
    with pytest.raises(ValueError, match=r"^mine:2:1: no stage: found the end, expected 'stage 0"):
        from_text("jaxptis plan 1\n", source="mine")


def test_no_device_rows() -> None:
    with pytest.raises(ValueError, match=r"^plan:8:1: no device row: found the end, expected 'dev"):
        from_text("\n".join(LINES[:8]))


def test_a_plan_that_cannot_run_names_the_source() -> None:
    text = TEXT.replace("0F0 0F1 0B0 0B1", "0F0 0B0 0F1 0B1").replace("1I0 1F1", "1F1 1I0")
    with pytest.raises(ValueError, match=r"^mine: deadlock: device 0 waits at 0B0 for 1I0; dev"):
        from_text(text, source="mine")
