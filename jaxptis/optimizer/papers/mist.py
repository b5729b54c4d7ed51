"""The partition of Mist (Zhu et al., EuroSys 2025), for 1F1B: short, and within the memory."""

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

from jaxptis.cluster import Cluster
from jaxptis.optimizer.papers.draft import Draft
from jaxptis.optimizer.papers.predictor import Predictor
from jaxptis.optimizer.partition.balance import check_fills_devices
from jaxptis.optimizer.partition.within_memory import partition_within
from jaxptis.performance import Costs, Timeline, simulate
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import schedule

_Edges = tuple[int, ...]
_SHORTER = 1 - 1e-9  # by more than floats differ
_REACH = 3  # stages that a layer moves across


def mist(costs: Costs, cluster: Cluster, num_microbatches: int) -> Plan:
    """Cut layers into a stage a device so that a step of 1F1B is short, and fits the memory.

    All microbatches go through the longest stage one after the other, so it is made as short as
    can be; then layers move between stages as long as that makes the step shorter. Stage s of P has
    P - s microbatches in flight: it saves more than those after it, and where memory is scarce has
    fewer layers. Of Mist this is the partition alone: it also searches recomputation, offloading
    and data parallelism.

    Args:
        costs: of the layers.
        cluster: the devices, with their memory, speed and links.
        num_microbatches: of a step.

    Raises:
        ValueError: there are fewer layers than devices, or no partition fits the memory.
    """
    num_devices = len(cluster.devices)
    homes = tuple(range(num_devices))
    check_fills_devices(len(costs.layers), num_devices)
    predictor = Predictor(costs, cluster, num_microbatches, blocking=True)
    rows = schedule("1f1b", num_devices=num_devices, num_microbatches=num_microbatches)

    def to_plan(edges: _Edges) -> Plan:
        stages = (
            StagePlan(layers=tuple(layer.name for layer in costs.layers[start:end]), device=device)
            for device, (start, end) in enumerate(pairwise(edges))
        )
        return Plan(stages=tuple(stages), schedule=rows)

    def run(edges: _Edges) -> Timeline:
        return simulate(to_plan(edges), costs, cluster, blocking=True)

    def estimate_s(edges: _Edges, limit_s: float) -> float:
        return predictor.estimate_s(Draft(edges, homes, more_ahead=0, whole=True), limit_s)

    in_flight = [min(num_devices - stage, num_microbatches) for stage in homes]
    edges = partition_within(predictor.problem, in_flight, run)
    now = run(edges)
    moves = _moves(edges)
    while move := next(moves, None):
        limit_s = estimate_s(edges, np.inf) * _SHORTER
        if estimate_s(move, limit_s) <= limit_s:
            after = run(move)
            if after.step_s < now.step_s * _SHORTER and predictor.fits(after):
                edges, now, moves = move, after, _moves(move)
    return to_plan(edges)


def _moves(edges: _Edges) -> Iterator[_Edges]:
    """Yield partitions in which a stage has a layer more, and one not far from it a layer fewer."""
    for first, last in combinations(range(1, len(edges)), 2):
        for step in (1, -1) if last - first <= _REACH else ():
            moved = [edge + step * (first <= k < last) for k, edge in enumerate(edges)]
            if all(start < end for start, end in pairwise(moved)):
                yield tuple(moved)
