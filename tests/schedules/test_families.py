"""One battery over the registry: what holds for every family, and what is known of each."""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path
from random import Random

import pytest

from jaxptis.performance import Costs, LayerCost, Timeline, simulate
from jaxptis.plan import Plan, Schedule, StagePlan, Task, schedule_from_csv, schedule_to_csv
from jaxptis.schedules import FAMILIES, StageCosts, placement, schedule

GOLDEN = Path(__file__).parents[1] / "data" / "schedules"
GOLDEN_NAMES = {
    "1f1b": "1f1b",
    "dualpipev": "dualpipe-v",
    "gpipe": "gpipe",
    "i1f1b_v2": "interleaved(v=2)",
    "i1f1b_v3": "interleaved(v=3)",
    "zbh1": "zb-h1",
    "zbh2": "zb-h2",
    "zbv": "zb-v",
}
STRATEGIES = [
    *FAMILIES,
    "interleaved(v=3)",
    "hanayo(waves=2)",
    "list(stages_per_device=2)",
    "list(stages_per_device=3, in_flight=1)",
]
BATCHES = (1, 2, 3, 8, 13)

each = pytest.mark.parametrize("strategy", STRATEGIES)

# Stage inputs that device r of P keeps at most for M microbatches, from the sources. Equal to what
# is kept, or a bound (see BOUNDS).
KEPT: dict[str, Callable[[int, int, int], int | Fraction]] = {
    "gpipe": lambda P, M, r: M,
    "1f1b": lambda P, M, r: min(P - r, M),
    "zb-h1": lambda P, M, r: min(P, M),
    "zb-h2": lambda P, M, r: min(2 * P - 1, M),
    "zb-v": lambda P, M, r: 2 * P,
    "dualpipe-v": lambda P, M, r: 2 * P + 1,
    "v-half": lambda P, M, r: P + 2,
    "v-min": lambda P, M, r: Fraction(2 * (P + 4), 3),
    "hanayo": lambda P, M, r: 2 * min(P, M),
    "hanayo(waves=2)": lambda P, M, r: 4 * min(P, M),
    "list": lambda P, M, r: min(P, M),
    "list(stages_per_device=2)": lambda P, M, r: 2 * min(P, M),
    "list(stages_per_device=3, in_flight=1)": lambda P, M, r: 3,
    "interleaved": lambda P, M, r: min(2 * M, 2 * (P - 1 - r) + _group(P, M) + 1),
    "interleaved(v=3)": lambda P, M, r: min(3 * M, 2 * (P - 1 - r) + 2 * _group(P, M) + 1),
}
BOUNDS = {name for name in STRATEGIES if name.startswith(("zb-v", "v-", "hanayo", "list"))}


def _group(P: int, M: int) -> int:
    """Find the group of interleaved 1F1B by counting: all groups full, or of P or more."""
    return next(G for G in range(min(P, M), M + 1) if M % G == 0 or M % G >= P)


def _make(strategy: str, P: int, M: int) -> Schedule:
    costs = StageCosts.even(len(placement(strategy, num_devices=P)))
    return schedule(strategy, num_devices=P, num_microbatches=M, costs=costs)


def _sizes(strategy: str) -> Iterator[tuple[int, int]]:
    for P, M in product(range(1, 9), BATCHES):
        if strategy != "dualpipe-v" or M >= 2 * P:
            yield P, M


def _plan(strategy: str, rows: Schedule) -> Plan:
    devices = placement(strategy, num_devices=len(rows))
    stages = (StagePlan(layers=(f"layer{i}",), device=d) for i, d in enumerate(devices))
    return Plan(stages=tuple(stages), schedule=rows)


def _simulate(plan: Plan, seconds: Callable[[int, str], float]) -> Timeline:
    """Simulate stages of the given seconds, by stage and kind F, I or W; B = I + W."""
    layers = (
        LayerCost(
            name=name,
            forward_s=seconds(stage, "F"),
            backward_s=seconds(stage, "I") + seconds(stage, "W"),
            input_grad_s=seconds(stage, "I"),
            weight_grad_s=seconds(stage, "W"),
        )
        for stage, name in enumerate(plan.layers)
    )
    return simulate(plan, Costs(tuple(layers)))


def _run(strategy: str, P: int, M: int, f: float = 1, i: float = 1, w: float = 1) -> Timeline:
    """Simulate equal stages; f, i and w are the seconds of all stages of a device."""
    plan = _plan(strategy, _make(strategy, P, M))
    per_device = plan.num_stages // P
    return _simulate(plan, lambda _, kind: {"F": f, "I": i, "W": w}[kind] / per_device)


def test_every_family_is_tested() -> None:
    assert set(KEPT) == set(STRATEGIES)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.csv")), ids=lambda path: path.stem)
def test_golden_tables(path: Path) -> None:
    match = re.fullmatch(r"(.+)_P(\d+)_M(\d+)", path.stem)
    assert match is not None
    made = _make(GOLDEN_NAMES[match[1]], int(match[2]), int(match[3]))
    text = path.read_text()
    # Two overlapped tasks are one cell there.
    pairs = re.sub(r"\((\w+);(\w+)\)OVERLAP_F_B", r"\1,\2", text)
    assert schedule_to_csv(made) == pairs
    assert schedule_from_csv(text) == made


@each
def test_runs_every_task_once(strategy: str) -> None:
    for P, M in _sizes(strategy):
        rows = _make(strategy, P, M)
        num_stages = len(placement(strategy, num_devices=P))
        kinds: dict[tuple[int, int], str] = dict.fromkeys(product(range(num_stages), range(M)), "")
        for row in rows:
            for task in row:
                kinds[task.stage, task.microbatch] += task.kind
        assert len(kinds) == num_stages * M
        assert set(kinds.values()) <= {"FB", "FIW"}, (P, M)
        plan = _plan(strategy, rows)  # every task on its device, and no deadlock
        assert (plan.num_devices, plan.num_microbatches) == (P, M)


@each
def test_keeps_stage_inputs(strategy: str) -> None:
    for P, M in _sizes(strategy):
        for device, row in enumerate(_make(strategy, P, M)):
            kept = peak = 0
            for task in row:
                kept += {"F": 1, "I": 0, "B": -1, "W": -1}[task.kind]
                peak = max(peak, kept)
            assert kept == 0
            known = KEPT[strategy](P, M, device)
            assert peak == known or (strategy in BOUNDS and peak < known), (P, M, device, peak)


@each
def test_takes_no_less_than_the_work(strategy: str) -> None:
    """A device waits for the stages before its first, and then has all its work to do."""
    for P, M in _sizes(strategy):
        step_s = _run(strategy, P, M, 1, 1.25, 0.75).step_s
        first_s = 1 / (len(placement(strategy, num_devices=P)) // P)
        assert step_s >= (P - 1) * first_s + M * 3 - 1e-9, (P, M)  # thirds are rounded


@each
def test_longer_tasks_make_no_shorter_step(strategy: str) -> None:
    rng = Random(strategy)
    for P, M in (3, 7), (4, 8), (5, 10):
        plan = _plan(strategy, _make(strategy, P, M))
        keys = list(product(range(plan.num_stages), "FIW"))
        seconds = {key: rng.choice((0.5, 1.0, 2.0)) for key in keys}
        steps = []
        for _ in range(10):
            steps.append(_simulate(plan, lambda *key: seconds[key]).step_s)  # noqa: B023
            seconds[rng.choice(keys)] *= 1.5
        assert steps == sorted(steps)


@each
def test_split_in_place_makes_no_longer_step(strategy: str) -> None:
    """I and W in the place of B, at no price: the gradient leaves W earlier."""
    for P, M in (2, 5), (4, 8), (5, 11):
        rows = _make(strategy, P, M)
        split = tuple(
            tuple(
                part
                for task in row
                for part in (
                    (Task(task.stage, kind, task.microbatch) for kind in "IW")
                    if task.kind == "B"
                    else (task,)
                )
            )
            for row in rows
        )
        before, after = (
            _simulate(_plan(strategy, each), lambda _, kind: {"F": 1, "I": 1.5, "W": 0.5}[kind])
            for each in (rows, split)
        )
        assert after.step_s <= before.step_s


# ---- Closed forms -------------------------------------------------------------------------------

closed = pytest.mark.parametrize(("P", "M"), [(P, k * P) for P in (2, 4, 6, 8) for k in (2, 3, 4)])


@closed
@pytest.mark.parametrize(
    ("f", "i", "w"), [(1, 1, 1), (1, 1.5, 0.5), (1, 1.25, 1), (2, 2, 1), (1, 2, 1)]
)
def test_steps_for_any_durations(P: int, M: int, f: float, i: float, w: float) -> None:
    b = i + w
    expected = {
        "gpipe": (M + P - 1) * (f + b),
        "1f1b": (M + P - 1) * (f + b),
        "interleaved(v=2)": M * (f + b) + (P - 1) * (f + b) / 2,
        "interleaved(v=4)": M * (f + b) + (P - 1) * (f + b) / 4,
        "zb-h1": M * (f + b) + (P - 1) * (f + i - w),
    }
    for strategy, step_s in expected.items():
        assert _run(strategy, P, M, f, i, w).step_s == step_s, strategy


@closed
def test_steps_for_equal_durations(P: int, M: int) -> None:
    """Zero bubble: after its first task, no device waits until its last."""
    for strategy, first_s in ("zb-h2", 1.0), ("zb-v", 0.5):
        timeline = _run(strategy, P, M)
        assert timeline.step_s == 3 * M + (P - 1) * first_s, strategy
        for row in timeline.spans:
            assert row[-1].end_s - row[0].start_s == 3 * M, strategy


@closed
def test_forwards_before_the_first_backward(P: int, M: int) -> None:
    """The warm-up, and the forward of the first pair."""
    for r in range(P):
        expected = {
            "gpipe": M,
            "1f1b": P - r,
            "interleaved(v=3)": 2 * (P - 1 - r) + 2 * P + 1,
            "zb-h1": P - r,
            "zb-h2": 2 * (P - r) - 1,
            "zb-v": 2 * P,
            "dualpipe-v": 2 * P + (r == P - 1),
        }
        for strategy, count in expected.items():
            kinds = "".join(task.kind for task in _make(strategy, P, M)[r])
            assert len(kinds) - len(kinds.lstrip("F")) == count, (strategy, r)


@pytest.mark.parametrize(("P", "M"), [(4, 8), (4, 32), (8, 16), (8, 32), (12, 24)])
def test_blocks_repeat_without_waiting(P: int, M: int) -> None:
    """V-Half and V-Min: a microbatch more takes the time of its tasks, and no more."""
    for strategy in "v-half", "v-min":
        before, after = (_run(strategy, P, each).step_s for each in (M, M + 1))
        assert after - before == 3, strategy


@pytest.mark.parametrize("P", [2, 4, 8])
def test_memory_buys_time(P: int) -> None:
    """The more memory a V has, the shorter is the step; the least is still shorter than 1F1B."""
    steps = [_run(strategy, P, 4 * P).step_s for strategy in ("zb-v", "v-half", "v-min", "1f1b")]
    assert steps == sorted(steps)
    assert steps[-2] < steps[-1]


@pytest.mark.parametrize("P", [2, 4, 8])
def test_waves_fill_the_pipeline_sooner(P: int) -> None:
    """Hanayo: the more waves, the shorter is the step; with one it is shorter than 1F1B."""
    waves = (f"hanayo(waves={waves})" for waves in (1, 2, 4))
    steps = [_run(strategy, P, P).step_s for strategy in ("1f1b", *waves)]
    assert all(after < before for before, after in pairwise(steps))
