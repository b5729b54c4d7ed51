"""What the performance model says of a draft."""

from math import inf
from typing import NamedTuple

import numpy as np

from jaxptis.cluster import Cluster
from jaxptis.optimizer.papers.draft import Draft
from jaxptis.optimizer.search.anneal import step_s_of
from jaxptis.optimizer.search.best import to_plan
from jaxptis.optimizer.search.polish import order_of
from jaxptis.optimizer.steps.problem import Problem
from jaxptis.performance import Costs, Timeline, simulate
from jaxptis.plan import Plan

_TIGHTER = 1.0, 0.97, 0.9  # of the memory: a list schedule does not count what waits to be read
_NO_ORDER = np.empty((0, 3), np.int64)


class Predicted(NamedTuple):
    """A draft, its list schedule as a plan, and the timeline of that."""

    draft: Draft
    plan: Plan
    timeline: Timeline


class Predictor:
    """Knows the layers, the devices, and how devices hand on results."""

    def __init__(
        self, costs: Costs, cluster: Cluster, num_microbatches: int, *, blocking: bool
    ) -> None:
        self.problem = Problem.of(costs, cluster, num_microbatches)
        self._costs, self._cluster, self._blocking = costs, cluster, blocking
        self._names = [layer.name for layer in costs.layers]

    def estimate_s(self, draft: Draft, limit_s: float) -> float:
        """Return the seconds of a step if no transfer holds up a device; infinite if above a limit.

        Infinite, too, if a device lacks the memory for one microbatch in each of its stages, and
        for what an input gradient keeps beside.
        """
        return _estimate_s(draft, self.problem, limit_s)

    def predict(self, draft: Draft) -> Predicted | None:
        """Return what `simulate` says; None if no list schedule was found that fits the memory."""
        for tighter in _TIGHTER:
            problem = self.problem._replace(memory=self.problem.memory * tighter)
            if _estimate_s(draft, problem, inf) == inf:
                return None
            predicted = self._list_schedule(draft, problem)
            if self.fits(predicted.timeline):
                return predicted
        return None

    def one_in_flight(self, draft: Draft) -> Predicted:
        """Return it with one microbatch at a time in each stage, whatever memory that takes."""
        sparing = draft._replace(more_ahead=-len(draft.homes))
        unlimited = np.full(self.problem.num_devices, inf)
        return self._list_schedule(sparing, self.problem._replace(memory=unlimited))

    def _list_schedule(self, draft: Draft, problem: Problem) -> Predicted:
        plan = to_plan(problem, order_of(problem, draft.candidate(problem)), self._names)
        timeline = simulate(plan, self._costs, self._cluster, blocking=self._blocking)
        return Predicted(draft, plan, timeline)

    def fits(self, timeline: Timeline) -> bool:
        """Return whether every device has the memory that it needs."""
        peaks = np.array([curve.peak_bytes for curve in timeline.memory])
        return bool(np.all(peaks <= self.problem.memory))


def _estimate_s(draft: Draft, problem: Problem, limit_s: float) -> float:
    return step_s_of(problem, draft.candidate(problem), limit_s, _NO_ORDER)[0]
