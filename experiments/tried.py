"""What strategies make of the same layers, devices and microbatches."""

import dataclasses

from experiments.predicted_step import PredictedStep, predicted, why_it_does_not_fit
from jaxptis.cluster import Cluster
from jaxptis.make_plan import make_plan
from jaxptis.performance import Costs

BASE = "interleaved(partition=uniform)"  # Megatron-LM's, to which others are compared


@dataclasses.dataclass(frozen=True)
class Tried:
    """What came of a strategy.

    Attributes:
        strategy: its name.
        step: its plan; None if it cannot plan this.
        refusal: why not, or which device lacks memory; None if nothing is in the way.
    """

    strategy: str
    step: PredictedStep | None
    refusal: str | None = None


def attempt(strategy: str, costs: Costs, cluster: Cluster, num_microbatches: int) -> Tried:
    """Returns the step of a strategy, or why there is none."""
    try:
        plan = make_plan(costs, strategy, cluster=cluster, num_microbatches=num_microbatches)
    except ValueError as error:
        return Tried(strategy, None, str(error))
    step = predicted(plan, costs, cluster)
    return Tried(strategy, step, why_it_does_not_fit(step))


def recomputing(tried: Tried, costs: Costs, cluster: Cluster) -> Tried:
    """Returns the same plan, whose stages recompute all, if that is what it lacks to fit."""
    if tried.step is None or tried.refusal is None:
        return tried
    plan = tried.step.plan
    stages = tuple(dataclasses.replace(stage, recompute="all") for stage in plan.stages)
    step = predicted(dataclasses.replace(plan, stages=stages), costs, cluster)
    return Tried(tried.strategy, step, why_it_does_not_fit(step))
