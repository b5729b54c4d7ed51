"""Timelines with transfers and memory, to draw."""

from random import Random

from jaxptis.cluster import Cluster, DeviceSpec, Link
from jaxptis.performance import Costs, LayerCost, Span, Timeline, simulate
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import placement, schedule

GIB = 2**30


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
    return plan, timeline_of(plan, costs_of(plan), transfer_s)


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
    return plan, timeline_of(plan, costs, transfer_s)


def costs_of(plan, forward_ms=None):
    """B and I + W take twice a forward. What is saved is large, what lasts larger."""
    return Costs(
        tuple(
            LayerCost(
                name=name,
                forward_s=f,
                backward_s=2 * f,
                input_grad_s=1.2 * f,
                weight_grad_s=0.8 * f,
                input_bytes=16 * 2**20,
                saved_bytes=GIB // 4,
                kept_bytes=GIB // 8,
                param_bytes=GIB // 4,
                grad_bytes=GIB // 4,
                state_bytes=GIB // 2,
            )
            for name, f in ((n, (forward_ms or {}).get(n, 1.0) / 1e3) for n in plan.layers)
        )
    )


def timeline_of(plan, costs, transfer_s):
    """Links that take this long for whatever they carry."""
    spec = DeviceSpec(kind="drawn", flops_per_s=1.0, bytes_per_s=1.0)
    cluster = Cluster((spec,) * plan.num_devices, Link(latency_s=transfer_s))
    return simulate(plan, costs, cluster)


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
    return Timeline(spans, transfers)
