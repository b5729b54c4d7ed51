from collections.abc import Callable
from math import inf, nan
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptis.performance import Costs, LayerCost, simulate
from jaxptis.plan import Plan, Schedule, StagePlan
from jaxptis.schedules import StageCosts, list_schedule, schedule
from tests.clusters import equal_devices


def _costs(seconds: Callable[[int, str], float], num_stages: int) -> StageCosts:
    forward_s, backward_s, input_grad_s, weight_grad_s = (
        tuple(seconds(stage, kind) for stage in range(num_stages)) for kind in "FBIW"
    )
    return StageCosts(
        forward_s=forward_s,
        backward_s=backward_s,
        input_grad_s=input_grad_s,
        weight_grad_s=weight_grad_s,
    )


def _equal(num_stages: int, f: float, b: float, i: float, w: float) -> StageCosts:
    return _costs(lambda _, kind: {"F": f, "B": b, "I": i, "W": w}[kind], num_stages)


def _step_s(
    rows: Schedule, placement: tuple[int, ...], costs: StageCosts, transfer_s: float = 0.0
) -> float:
    """Check the rows, and simulate them with the simulator, which the schedules do not know."""
    names = [f"layer{stage}" for stage in range(len(placement))]
    stages = (StagePlan(layers=(n,), device=d) for n, d in zip(names, placement, strict=True))
    layers = (
        LayerCost(name=name, forward_s=f, backward_s=b, input_grad_s=i, weight_grad_s=w)
        for name, f, b, i, w in zip(
            names,
            costs.forward_s,
            costs.backward_s,
            costs.input_grad_s,
            costs.weight_grad_s,
            strict=True,
        )
    )
    plan = Plan(stages=tuple(stages), schedule=rows)
    cluster = equal_devices(len(rows), latency_s=transfer_s)
    return simulate(plan, Costs(tuple(layers)), cluster).step_s


def _peaks(rows: Schedule) -> list[int]:
    """Count the stage inputs that every device keeps at most."""
    peaks = []
    for row in rows:
        kept = [0]
        for task in row:
            kept.append(kept[-1] + {"F": 1, "I": 0, "B": -1, "W": -1}[task.kind])
        peaks.append(max(kept))
    return peaks


@pytest.mark.parametrize("P", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    ("f", "i", "w"),
    [(1, 1, 1), (1, 1.5, 0.5), (1, 1.25, 1), (1, 2, 1), (1, 0.75, 1.25), (1, 0.5, 0.5), (3, 1, 2)],
)
def test_no_worse_than_fixed_schedules(P: int, f: float, i: float, w: float) -> None:
    """With even stages, at the memory of 1F1B and ZB-H1: at most their steps, at least the work."""
    placement, costs = tuple(range(P)), _equal(P, f, i + w, i, w)
    for M in 1, P, 2 * P, 3 * P, 13:
        made = list_schedule(placement, costs, M, in_flight=P)
        fixed = (schedule(name, num_devices=P, num_microbatches=M) for name in ("1f1b", "zb-h1"))
        step_s = _step_s(made, placement, costs)
        assert step_s <= min(_step_s(rows, placement, costs) for rows in fixed)
        assert step_s >= M * (f + i + w) + (P - 1) * f
        assert max(_peaks(made)) <= min(P, M)


def test_no_limit_reaches_the_bound() -> None:
    """With F = I = W and memory for all, no device waits after its first task."""
    for P, M in (2, 4), (4, 8), (8, 16):
        placement, costs = tuple(range(P)), _equal(P, 1, 2, 1, 1)
        rows = list_schedule(placement, costs, M)
        assert _step_s(rows, placement, costs) == 3 * M + P - 1


@given(st.randoms(use_true_random=False))
def test_any_placement_any_costs(rng: Random) -> None:
    """Devices with different numbers of stages, in any order: all run, and memory holds."""
    num_devices = rng.randint(1, 4)
    extra = [rng.randrange(num_devices) for _ in range(rng.randint(0, 4))]
    placement = (*range(num_devices), *extra)
    placement = tuple(rng.sample(placement, len(placement)))
    M, in_flight = rng.randint(1, 6), rng.choice((None, 1, 2, 3))
    costs = _costs(lambda *_: rng.randint(0, 8) / 4, len(placement))
    transfer_s = rng.choice((0.0, 0.5))
    rows = list_schedule(placement, costs, M, transfer_s=transfer_s, in_flight=in_flight)
    for device, peak in enumerate(_peaks(rows)):
        assert peak <= (in_flight or M) * placement.count(device)
    backward = [
        min(whole, first + second)
        for whole, first, second in zip(
            costs.backward_s, costs.input_grad_s, costs.weight_grad_s, strict=True
        )
    ]
    work = [0.0] * num_devices
    for device, f, b in zip(placement, costs.forward_s, backward, strict=True):
        work[device] += M * (f + b)
    assert _step_s(rows, placement, costs, transfer_s) >= max(work)


def test_the_bottleneck_never_waits() -> None:
    """One stage of twice the work: the step is what comes before it, and its work."""
    P, M = 8, 32
    placement = tuple(range(P))
    costs = _costs(lambda s, kind: (1 + (s == P - 1)) * (1 + (kind == "B")), P)
    rows = list_schedule(placement, costs, M, in_flight=P)
    assert _step_s(rows, placement, costs) == (P - 1) + M * 6


def test_backwards_are_split_where_that_pays() -> None:
    """A price of splitting, paid by every microbatch, against holes at the end, paid once."""
    P, M = 4, 32
    placement = tuple(range(P))

    def kinds(price: float) -> list[str]:
        costs = _equal(P, 1, 2, price, price)
        rows = list_schedule(placement, costs, M, in_flight=P)
        return [
            "".join(sorted({task.kind for task in rows[0] if task.microbatch == m}))
            for m in range(M)
        ]

    assert kinds(1.0) == ["FIW"] * M
    assert kinds(1.2) == ["BF"] * (M - P) + ["FIW"] * P
    assert kinds(2.0) == ["BF"] * M


def test_refusals() -> None:
    costs = StageCosts.even(2)
    with pytest.raises(ValueError, match=r"placement \[0, 2\] leaves a device without a stage"):
        list_schedule((0, 2), costs, 2)
    with pytest.raises(ValueError, match=r"placement \[\] leaves a device without a stage"):
        list_schedule((), costs, 2)
    with pytest.raises(ValueError, match="the costs are of 2 stages, but the placement has 3"):
        list_schedule((0, 1, 0), costs, 2)
    with pytest.raises(ValueError, match="num_microbatches is 0; use 1 or more"):
        list_schedule((0, 1), costs, 0)
    with pytest.raises(ValueError, match="in_flight is 0; use 1 or more"):
        list_schedule((0, 1), costs, 2, in_flight=0)


@pytest.mark.parametrize("seconds", [-1.0, inf, nan])
def test_bad_costs(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"weight_grad_s of stage 1 is {seconds}; use finite"):
        StageCosts(
            forward_s=(1, 1), backward_s=(2, 2), input_grad_s=(1, 1), weight_grad_s=(1, seconds)
        )
    with pytest.raises(ValueError, match="backward_s has 1 stages, but forward_s has 2; make them"):
        StageCosts(forward_s=(1, 1), backward_s=(2,), input_grad_s=(1, 1), weight_grad_s=(1, 1))
