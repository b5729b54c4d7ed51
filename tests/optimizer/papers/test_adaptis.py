"""The tuning of AdaPtis: its log, what it keeps, and the plans that its authors published."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from jaxptis.cluster import Cluster
from jaxptis.make_plan import make_plan
from jaxptis.optimizer import adaptis
from jaxptis.optimizer.papers.adaptis import likely_phases
from jaxptis.optimizer.papers.adaptis_log import Adapted
from jaxptis.optimizer.papers.draft import Draft
from jaxptis.optimizer.papers.phase_moves import change_order, move_layers, move_stages
from jaxptis.performance import Costs, Span, Timeline, simulate
from jaxptis.plan import Plan, StagePlan, Task
from jaxptis.schedules import StageCosts
from jaxptis.schedules.greedy import Rule, greedy
from tests.clusters import device, equal_devices
from tests.optimizer.papers.small_cases import fits, plans_of_1f1b, random_case
from tests.published import published_costs, published_plans

TUNED = published_plans("tuned")
MEMORIES = None, 60, 80, 100


@pytest.mark.parametrize("num_devices", [4, 8, 16])
def test_beside_published_plans(num_devices: int) -> None:
    """Links free, as there: within 3 % of what their released tuner found, on every row."""
    ratios = []
    for published in (each for each in TUNED if each.num_devices == num_devices):
        costs = published_costs(published.model)
        adapted = adaptis(costs, equal_devices(num_devices), published.num_microbatches)
        ratios.append(simulate(adapted.plan, costs).step_s / published.makespan_s)
        print(f"{published}: {ratios[-1]:.4f} of theirs, {adapted.plan.num_stages} stages")
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean {mean:.4f}, at most {max(ratios):.4f}")
    assert len(ratios) == 16
    assert max(ratios) < 1.03


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_the_log_is_what_simulate_says(seed: int, blocking: bool) -> None:
    """Each kept move makes the step shorter, the last one's is the plan's; memory is kept."""
    costs, cluster, num_microbatches = random_case(seed, MEMORIES)
    try:
        adapted = adaptis(costs, cluster, num_microbatches, blocking=blocking)
    except ValueError as error:
        assert "no partition of one stage a device fits the memory" in str(error)
        for plan in plans_of_1f1b(costs, len(cluster.devices), 1):
            assert not fits(simulate(plan, costs, cluster, blocking=blocking), cluster)
        return
    timeline = simulate(adapted.plan, costs, cluster, blocking=blocking)
    assert fits(timeline, cluster)
    now_s = adapted.log.start_s
    for step in adapted.log.steps:
        assert step.before_s == now_s
        assert step.kept == (step.after_s < now_s * (1 - 1e-9))
        if step.kept:
            now_s = step.after_s
    assert now_s == timeline.step_s <= adapted.log.start_s
    assert ended(adapted)


def ended(adapted: Adapted) -> bool:
    """Return whether moves of the schedule, which there are always, were rolled back last."""
    last = [step for step in adapted.log.steps if step.phase == "schedule"][-1]
    return not last.kept


def test_the_start() -> None:
    """A uniform partition, and the list schedule that another program makes of it."""
    costs = published_costs("nemotron-h-4B")
    names, edges = [layer.name for layer in costs.layers], [0, 14, 28, 41, 54]
    ranges = [range(*edge) for edge in pairwise(edges)]
    forward_s, backward_s, input_grad_s, weight_grad_s = (
        tuple(costs.task_s(layers, kind) for layers in ranges) for kind in "FBIW"
    )
    rows = greedy(
        range(4),
        StageCosts(
            forward_s=forward_s,
            backward_s=backward_s,
            input_grad_s=input_grad_s,
            weight_grad_s=weight_grad_s,
        ),
        8,
        Rule(in_flight=8, num_whole=0, alternate=True, limit_ahead=False),
    )
    stages = tuple(
        StagePlan(layers=tuple(names[a:b]), device=home)
        for home, (a, b) in enumerate(pairwise(edges))
    )
    log = adaptis(costs, equal_devices(4), 8).log
    assert log.start_s == pytest.approx(
        simulate(Plan(stages=stages, schedule=rows), costs).step_s, rel=1e-12
    )
    assert log.steps[0].phase == "partition"


def timeline_of(*rows: list[tuple[float, float]]) -> Timeline:
    return Timeline(
        tuple(
            tuple(Span(Task(home, "F", m), *span) for m, span in enumerate(row))
            for home, row in enumerate(rows)
        )
    )


def test_the_bottleneck() -> None:
    uneven = timeline_of([(0, 4), (4, 9)], [(0, 2), (2, 4)])
    assert likely_phases(uneven, cheapest_s=4.9)[0] == "partition"
    # Device 1 idles at the ends only, device 0 in between: 5 against 4 seconds.
    at_ends = timeline_of([(0, 3), (7, 10)], [(2, 4), (4, 7)])
    assert likely_phases(at_ends, cheapest_s=1)[0] == "placement"
    inside = timeline_of([(0, 3), (7, 10)], [(0, 3), (6, 9)])
    assert likely_phases(inside, cheapest_s=1)[0] == "schedule"


def test_moves_keep_all_layers_and_devices() -> None:
    layers_s = [1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 1.0]
    draft = Draft((0, 2, 3, 5, 7), (0, 1, 2, 1))
    moves = [*move_layers(draft, 1, 0), *move_stages(draft, 1, 2, layers_s), *change_order(draft)]
    texts = [move.text for move in moves]
    assert "a layer from stage 3 on device 1 to stage 0 on device 0" in texts
    assert not any("from stage 1 " in text for text in texts)  # it has one layer
    assert "2 stages on each device" in texts
    assert len(set(texts)) == len(texts)
    for move in moves:
        assert move.draft != draft
        assert (move.draft.edges[0], move.draft.edges[-1]) == (0, 7)
        assert all(start < end for start, end in pairwise(move.draft.edges))
        assert set(move.draft.homes) == {0, 1, 2}
        assert all(home != after for home, after in pairwise(move.draft.homes))
        assert len(move.draft.homes) == len(move.draft.edges) - 1


@pytest.fixture(scope="module")
def costs() -> Costs:
    return published_costs("nemotron-h-4B")


def test_it_finds_the_same_again(costs: Costs) -> None:
    first, second = (adaptis(costs, equal_devices(4), 8) for _ in range(2))
    assert first == second


def test_memory_is_kept(costs: Costs) -> None:
    """With what a device of 1F1B needs, and in less time than 1F1B."""
    baseline = make_plan(costs, "1f1b", cluster=equal_devices(4), num_microbatches=8)
    limit = max(curve.peak_bytes for curve in simulate(baseline, costs).memory)
    found = simulate(adaptis(costs, Cluster((device(memory_bytes=limit),) * 4), 8).plan, costs)
    assert max(curve.peak_bytes for curve in found.memory) <= limit
    assert found.step_s < simulate(baseline, costs).step_s


def test_what_is_lacking_is_said(costs: Costs) -> None:
    """52 layers save a byte: the most even partition has 13 of them on a device."""
    adaptis(costs, Cluster((device(memory_bytes=13),) * 4), 8)
    message = "device [0-3] lacks 1 bytes of 13 for layers"
    with pytest.raises(ValueError, match=message):
        adaptis(costs, Cluster((device(memory_bytes=12),) * 4), 8)


def test_a_start_that_does_not_fit(costs: Costs) -> None:
    """Where one of the layers of the first device is large, it has fewer of them."""
    large = replace(costs.layers[1], saved_bytes=9)
    heavy = replace(costs, layers=(costs.layers[0], large, *costs.layers[2:]))
    cluster = Cluster((device(memory_bytes=15),) * 4)
    adapted = adaptis(heavy, cluster, 8)
    assert fits(simulate(adapted.plan, heavy, cluster), cluster)


def test_one_device(costs: Costs) -> None:
    adapted = adaptis(costs, equal_devices(1), 4)
    assert adapted.plan.num_stages == 1
    assert {step.phase for step in adapted.log.steps} == {"schedule"}


def test_too_few_layers(costs: Costs) -> None:
    few = replace(costs, layers=costs.layers[:3])
    with pytest.raises(ValueError, match="3 layers cannot fill 4 devices; pass 3 or fewer"):
        adaptis(few, equal_devices(4), 8)


def test_the_log_is_a_table(costs: Costs) -> None:
    log = adaptis(costs, equal_devices(4), 8).log
    head, start, *lines = str(log).splitlines()
    assert head.split() == ["phase", "step", "ms", "gain", "move"]
    assert start.split() == ["start", f"{log.start_s * 1e3:.3f}"]
    for line, step in zip(lines, log.steps, strict=True):
        phase, step_ms, gain = re.split(r"\s+", line)[:3]
        assert (phase, float(step_ms)) == (step.phase, round(step.after_s * 1e3, 3))
        assert float(gain.rstrip("%")) == pytest.approx(100 * step.gain, abs=0.01)
        assert line.endswith(step.move)
        assert ("kept" if step.kept else "rolled back") in line
