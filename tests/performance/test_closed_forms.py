"""Steps that are known from formulas, and from tables of other simulators."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptis.performance import Timeline, simulate
from jaxptis.plan import Plan, Schedule, Task
from tests.clusters import equal_devices
from tests.small_plans import layer_costs, named_plan, plan_of

# Multiples of 1/64 s, which floats add exactly: results are compared with == where all are.
C = 1 / 64

SIZES = [(P, k * P) for P in (2, 4, 5, 6, 8) for k in (1, 2, 3, 4)]
DURATIONS = [(1, 1, 1), (1, 1.5, 0.5), (1, 1.25, 1), (2, 2, 1), (1, 2, 1)]

sizes = pytest.mark.parametrize(("P", "M"), SIZES)


def run(
    plan: Plan,
    durations: tuple[float, float, float] = (1, 1, 1),
    latency_s: float = 0.0,
    *,
    factor: Callable[[int], float] = lambda stage: 1.0,
    blocking: bool = False,
) -> Timeline:
    """Simulate stages that take `factor` times F, I and W, shared by the stages of a device."""
    share = plan.num_devices / plan.num_stages
    seconds = dict(zip("FIW", durations, strict=True))
    costs = layer_costs(plan, lambda stage, kind: seconds[kind] * share * factor(stage))
    cluster = equal_devices(plan.num_devices, latency_s=latency_s)
    return simulate(plan, costs, cluster, blocking=blocking)


@sizes
@pytest.mark.parametrize("durations", DURATIONS)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_even_stages(name: str, P: int, M: int, durations: tuple[float, float, float]) -> None:
    """(M + P - 1) (F + B)."""
    timeline = run(named_plan(name, P, M), durations)
    assert timeline.step_s == (M + P - 1) * sum(durations)
    assert timeline.busy_s == (M * sum(durations),) * P
    assert timeline.bubble == pytest.approx([(P - 1) / (M + P - 1)] * P)


@sizes
@pytest.mark.parametrize("durations", DURATIONS)
def test_three_stages_a_device(P: int, M: int, durations: tuple[float, float, float]) -> None:
    """Interleaved 1F1B: M (F + B) + (P - 1) (F + B) / v; times 3, for floats to be exact."""
    whole = sum(durations)
    f, i, w = durations
    step_s = run(named_plan("interleaved(v=3)", P, M), (3 * f, 3 * i, 3 * w)).step_s
    assert step_s == 3 * M * whole + (P - 1) * whole


@sizes
@pytest.mark.parametrize("durations", DURATIONS)
@pytest.mark.parametrize("latency_s", [C, 0.125, 1.0])
def test_1f1b_with_latency(
    P: int, M: int, durations: tuple[float, float, float], latency_s: float
) -> None:
    """Paid in the steady state too: c (2 (P - 1) M / P + 2 P - 4), where nobody waits to send."""
    step_s = run(named_plan("1f1b", P, M), durations, latency_s).step_s
    paid_s = latency_s * (2 * (P - 1) * (M // P) + 2 * P - 4)
    assert step_s == (M + P - 1) * sum(durations) + paid_s


@sizes
@pytest.mark.parametrize("durations", DURATIONS)
def test_1f1b_with_transfers_that_block(
    P: int, M: int, durations: tuple[float, float, float]
) -> None:
    """The first microbatch goes there and back, 2 c (P - 1), and each other one costs 2 c.

    Those an inner device pays, for both of its neighbours; without one, each microbatch costs c.
    """
    step_s = run(named_plan("1f1b", P, M), durations, C, blocking=True).step_s
    paid_s = C * (2 * (P - 1) + (2 * (M - 1) if P > 2 else M))
    assert step_s == (M + P - 1) * sum(durations) + paid_s


@sizes
def test_gpipe_with_latency(P: int, M: int) -> None:
    """The latency is paid once on the way there and once on the way back."""
    assert run(named_plan("gpipe", P, M), latency_s=C).step_s == (M + P - 1) * 3 + 2 * (P - 1) * C


@pytest.mark.parametrize(("P", "M"), [(2, 3), (4, 8), (5, 7)])
def test_gpipe_bound_by_its_links(P: int, M: int) -> None:
    """Transfers longer than tasks: a link is a machine of the flow shop too, there and back."""
    F, B, C = 1.0, 2.0, 4.0
    step_s = run(named_plan("gpipe", P, M), latency_s=C).step_s
    assert step_s == P * (F + B) + 2 * (P - 1) * C + 2 * (M - 1) * C


_SECONDS = st.integers(0, 640).map(lambda ticks: ticks * C)


@given(st.data(), st.integers(1, 6), st.integers(1, 9))
def test_gpipe_of_uneven_stages(data: st.DataObject, P: int, M: int) -> None:
    """A flow shop there and a flow shop back: sum + (M - 1) max of each."""
    plan = named_plan("gpipe", P, M)
    draw = st.lists(_SECONDS, min_size=P, max_size=P)
    seconds = {"F": data.draw(draw), "I": data.draw(draw), "W": [0.0] * P}
    step_s = simulate(plan, layer_costs(plan, lambda stage, kind: seconds[kind][stage])).step_s
    assert step_s == sum(sum(each) + (M - 1) * max(each) for each in seconds.values())


# ---- Tables of the public zero-bubble schedulers, in three or two digits -------------------------


@pytest.mark.parametrize(
    ("strategy", "ratios"),
    [
        ("1f1b", (1.219, 1.254, 1.290)),
        ("interleaved", (1.109, 1.125, 1.141)),
        ("zb-h1", (1.073, 1.087, 1.102)),
        ("zb-h2", (1.073, 1.077, 1.080)),
        ("zb-v", (1.036, 1.054, 1.071)),
    ],
)
def test_latency_over_the_work(strategy: str, ratios: tuple[float, ...]) -> None:
    """The step over the work, P = 8, M = 32, for latencies of 0, 0.05 and 0.1 of F = I = W."""
    plan = named_plan(strategy, 8, 32)
    found = [run(plan, latency_s=c).step_s / 96 for c in (0, 0.05, 0.1)]
    assert found == pytest.approx(ratios, abs=6e-4)  # 1.0875 is printed as 1.087


GRID = {
    (4, 8): (1.375, 1.188, 1.125, 1.125, 1.062, 1.104, 1.229),
    (4, 64): (1.047, 1.023, 1.016, 1.016, 1.008, 1.013, 1.029),
    (8, 16): (1.438, 1.219, 1.146, 1.146, 1.073, 1.177, 1.281),
    (8, 64): (1.109, 1.055, 1.036, 1.036, 1.018, 1.044, 1.070),
    (16, 64): (1.234, 1.117, 1.078, 1.078, 1.039, 1.107, 1.154),
}


@pytest.mark.parametrize(("P", "M"), GRID)
def test_steps_over_the_work(P: int, M: int) -> None:
    names = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min")
    found = [run(named_plan(name, P, M)).step_s / (3 * M) for name in names]
    assert found == pytest.approx(GRID[P, M], abs=6e-4)  # 1.0625 is printed as 1.062


@pytest.mark.parametrize(
    ("P", "M", "ratios"),
    [(8, 32, (1.254, 1.125, 1.109, 1.077)), (16, 64, (1.273, 1.133, 1.117, 1.082))],
)
def test_uneven_durations_and_latency(P: int, M: int, ratios: tuple[float, ...]) -> None:
    names = ("1f1b", "interleaved", "zb-h1", "zb-h2")
    plans = (named_plan(name, P, M) for name in names)
    found = [run(plan, (1, 1.15, 0.85), 0.05).step_s / (3 * M) for plan in plans]
    assert found == pytest.approx(ratios, abs=5e-4)


@pytest.mark.parametrize(
    ("factor", "step_s"),
    [
        (lambda s: 1.0, 120.40),
        (lambda s: 2.0 if s == 7 else 1.0, 213.70),
        (lambda s: {0: 1.1, 7: 1.5}.get(s, 1.0), 166.00),
        (lambda s: (0.7, 1.3)[s % 2], 145.60),
    ],
    ids=["even", "last stage x2", "first x1.1, last x1.5", "alternating"],
)
def test_uneven_stages_and_latency(factor: Callable[[int], float], step_s: float) -> None:
    """1F1B, P = 8, M = 32, a latency of 0.05."""
    found = run(named_plan("1f1b", 8, 32), latency_s=0.05, factor=factor).step_s
    assert found == pytest.approx(step_s, abs=5e-3)


def _wide_1f1b(P: int, M: int, more: int) -> Schedule:
    """1F1B with more forwards in the warm-up of all devices but the last."""
    rows = []
    for device in range(P):
        warm_up = min(P - 1 - device + more * (device < P - 1), M)
        kinds = "F" * warm_up + "FB" * (M - warm_up) + "B" * warm_up
        counts = dict.fromkeys("FB", 0)
        row = []
        for kind in kinds:
            row.append(Task(device, kind, counts[kind]))
            counts[kind] += 1
        rows.append(tuple(row))
    return tuple(rows)


@pytest.mark.parametrize(
    ("P", "M", "more", "step_s"),
    [(4, 16, 0, 58.4), (4, 16, 1, 57.3), (8, 32, 0, 120.4), (8, 32, 1, 118.1), (8, 32, 2, 117.7)],
)
def test_a_wider_window_hides_latency(P: int, M: int, more: int, step_s: float) -> None:
    found = run(plan_of(_wide_1f1b(P, M, more), range(P)), latency_s=0.05).step_s
    assert found == pytest.approx(step_s, abs=1e-9)  # 0.05 is no binary fraction


@pytest.mark.parametrize(("P", "M", "before_s", "after_s"), [(4, 8, 33, 30), (8, 16, 69, 62)])
def test_a_split_in_place_lets_the_gradient_leave_earlier(
    P: int, M: int, before_s: float, after_s: float
) -> None:
    """Work + (P - 1) (F + I), where the B of 1F1B are I and W."""
    plan = named_plan("1f1b", P, M)
    assert run(plan).step_s == before_s
    split = (
        tuple(
            Task(task.stage, kind, task.microbatch)
            for task in row
            for kind in ("F" if task.kind == "F" else "IW")
        )
        for row in plan.schedule
    )
    assert run(plan_of(tuple(split), range(P))).step_s == after_s == 3 * M + (P - 1) * 2
