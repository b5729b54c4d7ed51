import csv
import re
from pathlib import Path

import pytest

from jaxptis.plan import Plan, Schedule, StagePlan, Task
from jaxptis.schedules import FAMILIES, schedule

GOLDEN = Path(__file__).parent / "golden"

# Microbatches that device r of P keeps at most: the closed forms of the two papers.
KEPT = {
    "gpipe": lambda P, M, r: M,
    "1f1b": lambda P, M, r: min(P - r, M),
}

family = pytest.mark.parametrize("name", FAMILIES)
sizes = pytest.mark.parametrize(
    ("num_devices", "num_microbatches"),
    [(P, M) for P in (1, 2, 3, 4, 8) for M in (1, 2, 3, 4, 8, 13, 32)],
)


def _read(path: Path) -> Schedule:
    with path.open(newline="") as file:
        return tuple(tuple(Task.parse(cell) for cell in row if cell) for row in csv.reader(file))


@family
def test_golden_tables(name: str) -> None:
    paths = sorted(GOLDEN.glob(f"{name}_P*_M*.csv"))
    assert len(paths) == 3
    for path in paths:
        num_devices, num_microbatches = map(int, re.findall(r"_[PM](\d+)", path.stem))
        made = schedule(name, num_devices=num_devices, num_microbatches=num_microbatches)
        assert made == _read(path), path.name


@family
@sizes
def test_runs_one_stage_a_device(name: str, num_devices: int, num_microbatches: int) -> None:
    stages = (StagePlan(layers=(f"layer{i}",), device=i) for i in range(num_devices))
    rows = schedule(name, num_devices=num_devices, num_microbatches=num_microbatches)
    plan = Plan(stages=tuple(stages), schedule=rows)
    assert (plan.num_devices, plan.num_microbatches) == (num_devices, num_microbatches)
    assert {task.kind for row in rows for task in row} == {"F", "B"}


@family
@sizes
def test_keeps_microbatches(name: str, num_devices: int, num_microbatches: int) -> None:
    rows = schedule(name, num_devices=num_devices, num_microbatches=num_microbatches)
    for device, row in enumerate(rows):
        kept = peak = 0
        for task in row:
            kept += 1 if task.kind == "F" else -1
            peak = max(peak, kept)
        assert kept == 0
        assert peak == KEPT[name](num_devices, num_microbatches, device)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'zigzag' is not known; use one of 'gpipe', '1f1b'$"):
        schedule("zigzag", num_devices=2, num_microbatches=2)


def test_almost_a_name() -> None:
    with pytest.raises(ValueError, match="'1fb1' is not known; did you mean '1f1b'"):
        schedule("1fb1", num_devices=2, num_microbatches=2)


@family
@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(0, 2), (2, 0), (-1, 2)])
def test_numbers_below_one(name: str, num_devices: int, num_microbatches: int) -> None:
    with pytest.raises(ValueError, match=r"num_(devices|microbatches) is (0|-1); use 1 or more"):
        schedule(name, num_devices=num_devices, num_microbatches=num_microbatches)
