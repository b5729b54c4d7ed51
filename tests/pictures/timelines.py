"""Timelines with transfers and memory, to draw."""

from collections import defaultdict
from itertools import pairwise
from random import Random

from jaxptis.performance import Costs, LayerCost, Span, Timeline, simulate
from jaxptis.performance.bubbles import Bubble
from jaxptis.performance.memory import MemoryCurve
from jaxptis.performance.timeline import TransferSpan
from jaxptis.plan import Plan, StagePlan
from jaxptis.plan.order import needs
from jaxptis.schedules import placement, schedule

GIB = 2**30


class Filled(Timeline):
    """A timeline whose bubbles are counted in a way of our own."""

    @property
    def bubbles(self):
        counted = []
        for device, row in enumerate(self.spans):
            hidden_s, exposed_s = self._transfers_s(device)
            counted.append(
                Bubble(
                    warm_up_s=row[0].start_s if row else self.step_s,
                    steady_s=sum(after.start_s - before.end_s for before, after in pairwise(row)),
                    cool_down_s=self.step_s - row[-1].end_s if row else 0.0,
                    hidden_s=hidden_s,
                    exposed_s=exposed_s,
                )
            )
        return tuple(counted)

    def _transfers_s(self, device):
        """Seconds with transfers of a device while it computes, and while it does not."""
        own = [each for each in self.transfers if device in (each.source, each.target)]
        changes = [(t, 0, by) for each in own for t, by in ((each.start_s, 1), (each.end_s, -1))]
        changes += [(t, 1, by) for _, s, e in self.spans[device] for t, by in ((s, 1), (e, -1))]
        under_way, last_s, seconds = [0, 0], 0.0, [0.0, 0.0]
        for time_s, what, by in sorted(changes):
            if under_way[0]:
                seconds[under_way[1] == 0] += time_s - last_s
            under_way[what] += by
            last_s = time_s
        return seconds


def filled(plan, costs, *, transfer_s=0.0, num_bytes=16 * 2**20, fixed_bytes=4 * GIB):
    """Simulate, and add the transfers and the memory of it."""
    spans = simulate(plan, costs, transfer_s).spans
    end_s = {task: end for row in spans for task, _, end in row}
    transfers = [
        TransferSpan(
            plan.stages[need.stage].device,
            plan.stages[task.stage].device,
            need,
            task.stage,
            end_s[need],
            end_s[need] + transfer_s,
            num_bytes,
        )
        for task in end_s
        for need in needs(task, end_s)
        if plan.stages[need.stage].device != plan.stages[task.stage].device
    ]
    return Filled(
        spans,
        tuple(sorted(transfers, key=lambda each: each.start_s)),
        tuple(_memory(row, plan, fixed_bytes) for row in spans),
    )


def _memory(row, plan, fixed_bytes):
    """A forward saves a quarter GiB a layer; I frees it and keeps half for W."""
    changes = defaultdict(int)
    for task, start_s, end_s in row:
        saved = len(plan.stages[task.stage].layers) * GIB // 4
        grows = {"F": saved, "I": saved // 2, "B": 0, "W": 0}[task.kind]
        shrinks = {"F": 0, "I": saved, "B": saved, "W": saved // 2}[task.kind]
        changes[start_s] += grows
        changes[end_s] -= shrinks
    held, times_s, num_bytes = fixed_bytes, [0.0], [fixed_bytes]
    for time_s in sorted(changes):
        held += changes[time_s]
        times_s.append(time_s)
        num_bytes.append(held)
    saved = max(num_bytes) - fixed_bytes
    quarter = fixed_bytes // 4
    return MemoryCurve(
        times_s=tuple(times_s),
        num_bytes=tuple(num_bytes),
        peak_parts={
            "parameters": quarter,
            "gradients": quarter,
            "optimizer state": fixed_bytes - 2 * quarter,
            "saved": saved - saved // 5,
            "kept": saved // 5,
            "transfers": 0,
            "temporaries": 0,
        },
    )


def even(strategy, num_devices, num_microbatches, *, layers_per_stage=2, transfer_s=0.0):
    """A plan of like stages and its timeline; F, I and W of a layer take 1, 1.2 and 0.8 ms."""
    devices = placement(strategy, num_devices=num_devices)
    stages = [
        StagePlan(
            layers=tuple(f"layers_{stage * layers_per_stage + i}" for i in range(layers_per_stage)),
            device=device,
        )
        for stage, device in enumerate(devices)
    ]
    rows = schedule(strategy, num_devices=num_devices, num_microbatches=num_microbatches)
    plan = Plan(stages=tuple(stages), schedule=rows)
    return plan, filled(plan, costs_of(plan), transfer_s=transfer_s)


def uneven(num_microbatches=8, *, head_ms=3.0, transfer_s=0.0):
    """1F1B of four stages, the last of which has a heavy head."""
    names = (
        ("embed", "layers_0"),
        ("layers_1", "layers_2"),
        ("layers_3", "layers_4"),
        ("norm", "head"),
    )
    stages = tuple(StagePlan(layers=each, device=d) for d, each in enumerate(names))
    rows = schedule("1f1b", num_devices=4, num_microbatches=num_microbatches)
    plan = Plan(stages=stages, schedule=rows)
    costs = costs_of(plan, {"embed": 0.1, "norm": 0.1, "head": head_ms})
    return plan, filled(plan, costs, transfer_s=transfer_s)


def costs_of(plan, forward_ms=None):
    ms = {name: (forward_ms or {}).get(name, 1.0) / 1e3 for name in plan.layers}
    return Costs(
        tuple(
            LayerCost(
                name=n, forward_s=f, backward_s=2 * f, input_grad_s=1.2 * f, weight_grad_s=0.8 * f
            )
            for n, f in ms.items()
        )
    )


def jittered(timeline, seed=0):
    """What might be measured: every task and transfer a little longer, in the same order."""
    rng = Random(seed)
    stretch = 1.03

    def later(time_s):
        return time_s * stretch

    spans = tuple(
        tuple(
            Span(
                task,
                later(start_s),
                later(start_s) + (end_s - start_s) * rng.uniform(0.97, stretch),
            )
            for task, start_s, end_s in row
        )
        for row in timeline.spans
    )
    transfers = tuple(
        each._replace(start_s=later(each.start_s), end_s=later(each.end_s))
        for each in timeline.transfers
    )
    return type(timeline)(spans, transfers)
