"""The memory of devices: by hand, hold by hold, and by the executor's own accounting."""

from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import inf
from random import Random

import pytest

from jaxptis.cluster import Cluster, Link
from jaxptis.executor.instructions import Run
from jaxptis.executor.prove import prove
from jaxptis.performance import (
    Costs,
    LayerCost,
    MemoryCurve,
    Span,
    TiedParams,
    Timeline,
    check_memory,
    simulate,
)
from jaxptis.plan import Plan, Recompute, Task
from tests.clusters import device, equal_devices
from tests.performance.chains import chain_programs, emitted
from tests.performance.random_steps import Step, random_step
from tests.small_plans import named_plan

# One stage on each of two devices; B on the first, I and W on the second.
PLAN = Plan.parse(
    "jaxptis plan 1\n"
    "stage 0 on device 0\n  a\nstage 1 on device 1\n  b\n  c\n"
    "device 0: 0F0 0B0\ndevice 1: 1F0 1I0 1W0\n"
)


def layer(name: str, **num_bytes: int) -> LayerCost:
    return LayerCost(
        name=name, forward_s=1, backward_s=2, input_grad_s=1, weight_grad_s=1, **num_bytes
    )


COSTS = Costs(
    (
        layer(
            "a",
            saved_bytes=10,
            param_bytes=1000,
            forward_temporary_bytes=1,
            backward_temporary_bytes=3,
        ),
        layer(
            "b",
            input_bytes=300,
            saved_bytes=20,
            kept_bytes=5,
            made_bytes=4,
            grad_bytes=2000,
            input_grad_temporary_bytes=1,
            input_grad_held_bytes=100,
        ),
        layer(
            "c",
            input_bytes=40,
            saved_bytes=30,
            kept_bytes=6,
            made_bytes=5,
            forward_temporary_bytes=2,
            input_grad_temporary_bytes=4,
            input_grad_held_bytes=8,
            weight_grad_temporary_bytes=7,
        ),
    )
)


def test_counted_by_hand() -> None:
    """Transfers of 1 s: 0F0 0-1, 1F0 2-4, 1I0 4-6, 1W0 6-8, 0B0 7-9."""
    first, second = simulate(PLAN, COSTS, equal_devices(2, latency_s=1)).memory
    # What 0F0 makes for 1F0 leaves at 2; the gradient comes from 6 on.
    assert first.times_s == (0, 1, 2, 6, 7, 9)
    assert first.num_bytes == (
        1000 + 10 + 1 + 300,
        1000 + 10 + 300,
        1000 + 10,
        1000 + 10 + 300,
        1000 + 10 + 300 + 3,
        1000,
    )
    # c's input is saved like what b and c save. The gradient takes the place of b's input at 6.
    # I needs 4 for c, and then 1 for b beside the 8 that it holds of c.
    saved = 20 + 40 + 30
    assert second.times_s == (0, 1, 2, 4, 6, 7, 8)
    assert second.num_bytes == (
        2000,
        2000 + 300,
        2000 + 300 + saved + 2,
        2000 + 300 + saved + 9 + 9,
        2000 + 300 + 7 + 11,
        2000 + 7 + 11,
        2000,
    )
    assert (second.peak_bytes, second.peak_s) == (2408, 4)
    assert second.peak_parts == {
        "parameters": 0,
        "gradients": 2000,
        "optimizer state": 0,
        "saved": 300 + saved,
        "kept": 9,
        "transfers": 0,
        "temporaries": 9,
    }


def test_a_stage_that_recomputes_all() -> None:
    """It keeps its input only, and what it would save is a temporary of its backward."""
    first, second = PLAN.stages
    plan = replace(PLAN, stages=(first, replace(second, recompute="all")))
    _, curve = simulate(plan, COSTS, equal_devices(2, latency_s=1)).memory
    assert curve.num_bytes[2:4] == (2000 + 300 + 2, 2000 + 300 + 9 + 9 + 90)
    assert curve.peak_parts["temporaries"] == 99


def test_forwards_alone_keep_nothing() -> None:
    first, second = simulate(PLAN.forward_only(), COSTS, equal_devices(2, latency_s=1)).memory
    assert first.num_bytes == (1000 + 300 + 1, 1000 + 300, 1000)
    assert second.num_bytes == (0, 300, 302, 0)


def test_stages_of_one_device_share_parameters() -> None:
    """What layers share is there once on each of their devices, its state on the first's."""
    tied = TiedParams(layers=("a", "c"), param_bytes=7, grad_bytes=70, state_bytes=700)
    two = simulate(PLAN, replace(COSTS, tied=(tied,))).memory
    assert [curve.num_bytes[-1] for curve in two] == [1777, 2077]
    stages = tuple(replace(stage, device=0) for stage in PLAN.stages)
    rows = (tuple(map(Task.parse, ("0F0", "1F0", "1I0", "1W0", "0B0"))),)
    (one,) = simulate(Plan(stages=stages, schedule=rows), replace(COSTS, tied=(tied,))).memory
    assert one.num_bytes[-1] == 3777


@pytest.mark.parametrize(("P", "M"), [(2, 6), (4, 8), (4, 2)])
def test_microbatches_in_flight(P: int, M: int) -> None:
    """1F1B keeps min(P - r, M) microbatches, interleaved 1F1B 2 (P - 1 - r) + (v - 1) G + 1."""
    for strategy, most in (
        ("1f1b", [min(P - r, M) for r in range(P)]),
        ("interleaved(v=2)", [min(2 * (P - 1 - r) + min(P, M) + 1, 2 * M) for r in range(P)]),
    ):
        plan = named_plan(strategy, P, M)
        costs = Costs(tuple(layer(name, saved_bytes=100) for name in plan.layers))
        curves = simulate(plan, costs).memory
        assert [curve.peak_bytes for curve in curves] == [100 * count for count in most]


def test_a_cluster_with_too_little() -> None:
    timeline = simulate(PLAN, COSTS, equal_devices(2, latency_s=1))
    check_memory(timeline, Cluster((device(), device(memory_bytes=2408))))
    message = (
        r"device 1 needs 2,408 bytes 4000.000 ms into the step, but has 2,407; most of it, 2,000 "
        "bytes, is gradients: give it fewer layers"
    )
    with pytest.raises(ValueError, match=message):
        check_memory(timeline, Cluster((device(), device(memory_bytes=2407))))


@pytest.mark.parametrize("part", simulate(PLAN, COSTS).memory[0].peak_parts)
def test_every_part_has_a_remedy(part: str) -> None:
    curve = MemoryCurve(times_s=(0.0,), num_bytes=(9,), peak_parts={"saved": 3, part: 6})
    with pytest.raises(ValueError, match=f"most of it, 6 bytes, is {part}: [a-z]+ "):
        check_memory(Timeline(((),), memory=(curve,)), Cluster((device(memory_bytes=1),)))


def test_memory_that_cannot_be_checked() -> None:
    timeline = simulate(PLAN, COSTS)
    with pytest.raises(ValueError, match=r"has 2 devices, but the cluster 1; describe each"):
        check_memory(timeline, equal_devices(1))
    with pytest.raises(ValueError, match="says nothing of memory; use one that `simulate`"):
        check_memory(Timeline(timeline.spans), equal_devices(2))


# ---- Hold by hold --------------------------------------------------------------------------------

Hold = tuple[float, float, str, int]  # from, until, what it is, bytes


class Holds:
    """Everything that the devices hold, one by one."""

    def __init__(self, step: Step, timeline: Timeline) -> None:
        self.of: list[list[Hold]] = [[] for _ in step.plan.schedule]
        self.step, self.home = step, [stage.device for stage in step.plan.stages]
        self.costs = {cost.name: cost for cost in step.costs.layers}
        self.spans = {span.task: span for row in timeline.spans for span in row}
        self.sent = {each.made_by: each for each in timeline.transfers}
        self.trains = any(task.kind != "F" for task in self.spans)
        self.lasting()
        for task in self.spans:
            self.note(task)

    def layers(self, stage: int) -> list[LayerCost]:
        return [self.costs[name] for name in self.step.plan.stages[stage].layers]

    def crossing(self, stage: int) -> tuple[int, int]:
        """Return what comes from the stage before: what stays, and what the forward ends."""
        first = self.layers(stage)[0]
        if self.step.plan.stages[stage].recompute == "all":
            return first.input_bytes + first.skipping_bytes, 0
        return first.input_bytes, first.skipping_bytes

    def saved(self, stage: int, recompute: str) -> int:
        layers = self.layers(stage)
        inside = sum(each.input_bytes for each in layers) - layers[0].input_bytes
        return inside + sum(
            {"none": each.saved_all_bytes, "cheap": each.saved_bytes}[recompute] for each in layers
        )

    def lasting(self) -> None:
        owners: list[tuple[set[int], LayerCost | TiedParams]] = [
            ({self.home_of(name)}, cost) for name, cost in self.costs.items()
        ]
        owners += [({self.home_of(name) for name in t.layers}, t) for t in self.step.costs.tied]
        for devices, owner in owners:
            for at in devices:
                self.of[at].append((0, inf, "parameters", owner.param_bytes))
                if self.trains:
                    self.of[at].append((0, inf, "gradients", owner.grad_bytes))
            if self.trains:
                first = owner.layers[0] if isinstance(owner, TiedParams) else owner.name
                at = self.home_of(first)
                self.of[at].append((0, inf, "optimizer state", owner.state_bytes))

    def home_of(self, name: str) -> int:
        return next(stage.device for stage in self.step.plan.stages if name in stage.layers)

    def backward(self, stage: int, microbatch: int) -> Span:
        """Return the backward that frees what a forward saves; the forward, where nothing trains.

        That is B or I; of a first stage without input gradient, B or W.
        """
        kinds = "BWF" if self.is_whole(Task(stage, "W", microbatch)) else "BIF"
        tasks = (Task(stage, kind, microbatch) for kind in kinds)
        return next(self.spans[task] for task in tasks if task in self.spans)

    def is_whole(self, task: Task) -> bool:
        """Whether a task is a whole backward."""
        first_s = self.step.costs.layers[0].input_grad_s
        return task.kind == "B" or (task.kind == "W" and task.stage == 0 and first_s == 0)

    def note(self, task: Task) -> None:
        """List what a task brings, and what it makes for a stage of its own device."""
        s, m = task.stage, task.microbatch
        start, end = self.spans[task].start_s, self.spans[task].end_s
        recompute = self.step.plan.stages[s].recompute
        held = self.of[self.home[s]]
        if task.kind == "I" and self.is_whole(Task(s, "W", m)):
            return
        kind = "B" if self.is_whole(task) else task.kind
        held.append((start, end, "temporaries", temporaries(self.layers(s), kind)))
        if kind in "BI" and recompute == "all":
            held.append((start, end, "temporaries", self.saved(s, "cheap")))
        if task.kind == "F" and self.trains and recompute != "all":
            until = self.backward(s, m).end_s
            held.append((start, until, "saved", self.saved(s, recompute)))
        if task.kind == "I":
            made = sum(each.made_bytes for each in self.layers(s))
            held.append((start, end, "kept", made))
            kept = sum(each.kept_bytes for each in self.layers(s))
            held.append((end, self.spans[Task(s, "W", m)].end_s, "kept", kept))
        if task.kind == "F" and s + 1 < len(self.home):
            stays, ends = self.crossing(s + 1)
            until = self.backward(s + 1, m).end_s
            self.hand_on(task, s + 1, start, until, "saved", stays)
            self.hand_on(task, s + 1, start, self.spans[Task(s + 1, "F", m)].end_s, "saved", ends)
        if task.kind in "BI" and s:
            until = self.backward(s - 1, m).end_s
            self.hand_on(task, s - 1, end, until, "transfers", sum(self.crossing(s)))

    def hand_on(
        self, task: Task, reader: int, start: float, until: float, part: str, num_bytes: int
    ) -> None:
        """List a result: until it is sent, and where it is read until then."""
        if task in self.sent:
            transfer = self.sent[task]
            self.of[transfer.source].append((start, transfer.end_s, "transfers", num_bytes))
            start = transfer.start_s
        self.of[self.home[reader]].append((start, until, part, num_bytes))


def temporaries(layers: list[LayerCost], kind: str) -> int:
    """Return those of a layer, in a backward with what later layers hold; the most of all."""
    most = 0
    for i, here in enumerate(layers):
        needs, held = {
            "F": (here.forward_temporary_bytes, [0]),
            "B": (here.backward_temporary_bytes, [x.backward_held_bytes for x in layers]),
            "I": (here.input_grad_temporary_bytes, [x.input_grad_held_bytes for x in layers]),
            "W": (here.weight_grad_temporary_bytes, [0]),
        }[kind]
        most = max(most, needs + sum(held[i + 1 :]))
    return most


def test_hold_by_hold() -> None:
    for seed in range(300):
        step = random_step(Random(seed))
        timeline = simulate(step.plan, step.costs, step.cluster, blocking=bool(seed % 2))
        for found, held in zip(timeline.memory, Holds(step, timeline).of, strict=True):
            moments = {0.0, *(moment for hold in held for moment in hold[:2] if moment < inf)}
            curve = {
                moment: sum(size for start, end, _, size in held if start <= moment < end)
                for moment in sorted(moments)
            }
            for moment, num_bytes in curve.items():
                at = bisect_right(found.times_s, moment) - 1
                assert found.num_bytes[at] == num_bytes, (seed, moment)
            assert set(found.times_s) <= curve.keys()
            assert found.peak_bytes == max(curve.values())
            parts = Counter(dict.fromkeys(found.peak_parts, 0))
            for start, end, part, size in held:
                parts[part] += size * (start <= found.peak_s < end)
            assert found.peak_parts == parts, seed


def test_the_executor_counts_the_same() -> None:
    """Its peaks of the same lists, where all takes time, and I keeps what it makes.

    The gradient of a stage's input takes the input's place, as XLA is told to let it.
    """
    levels: tuple[Recompute, ...] = ("none", "cheap")
    for seed in range(300):
        rng = Random(seed)
        step = random_step(rng)
        stages = (replace(stage, recompute=rng.choice(levels)) for stage in step.plan.stages)
        plan = replace(step.plan, stages=tuple(stages))
        layers = (
            replace(
                each, made_bytes=each.kept_bytes, input_grad_s=float(index > 0), skipping_bytes=0
            )
            for index, each in enumerate(step.costs.layers)
        )
        costs = replace(step.costs, layers=tuple(layers), start_s=1.0)
        cluster = replace(step.cluster, link=Link(latency_s=1), links={})
        memory = simulate(plan, costs, cluster, blocking=True).memory
        assert tuple(curve.peak_bytes for curve in memory) == proven(plan, costs, cluster), seed


def proven(plan: Plan, costs: Costs, cluster: Cluster) -> tuple[int, ...]:
    """Return the peaks that the executor proves of its lists."""
    nbytes = {f"lasting{at}": c.num_bytes[-1] for at, c in enumerate(simulate(plan, costs).memory)}
    for s, (start, end) in enumerate(pairwise(plan.boundaries)):
        for m in range(plan.num_microbatches):
            recompute = plan.stages[s].recompute
            nbytes[f"saved{s}.{m}"] = costs.saved_bytes(range(start, end), recompute)
            nbytes[f"kept{s}.{m}"] = sum(each.kept_bytes for each in costs.layers[start:end])
            nbytes[f"x{s - 1}.{m}"] = nbytes[f"d{s}.{m}"] = costs.layers[start].input_bytes
    lasting = [{f"lasting{at}"} for at in range(plan.num_devices)]
    layers_of = [list(costs.layers[start:end]) for start, end in pairwise(plan.boundaries)]
    rows = emitted(plan, costs, cluster).free(lasting)
    accounts = prove(
        rows,
        given=lasting,
        held=lasting,
        nbytes=nbytes,
        donated={
            program.name: (0,)
            for (s, kind), program in chain_programs(plan).items()
            if kind in "BI" and s
        },
    )
    return tuple(
        replace(
            account,
            temporary_bytes=tuple(
                temporaries(
                    layers_of[each.task.stage],
                    "B" if (each.task.kind, each.task.stage) == ("W", 0) else each.task.kind,
                )
                if isinstance(each, Run)
                and each.task is not None
                and (each.task.kind, each.task.stage) != ("I", 0)  # which does nothing
                else 0
                for each in row
            ),
        ).peak_bytes
        for account, row in zip(accounts, rows.rows, strict=True)
    )
