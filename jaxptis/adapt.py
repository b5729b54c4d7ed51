"""Adapting to how fast devices and layers turn out to be: another order, for the same stages.

A list has tasks and transfers. Where the transfers stand follows from what the tasks were thought
to take, so even the same order of tasks may be run better.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

from jaxptis.cluster import Cluster
from jaxptis.compile import Pipeline
from jaxptis.optimizer import best_plan, reorder
from jaxptis.performance import Costs, simulate
from jaxptis.performance.observed import observed
from jaxptis.plan import Plan
from jaxptis.profile import Profile

_WORTH_DOING = 0.98  # measured steps vary, so one that is shorter by less is not worth a change
_WORTH_SAYING = 0.98  # a partition that shortens the step by less is no reason to stop
_SEARCH_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What came of looking at how long tasks take.

    All steps are predicted, by what was measured.

    Attributes:
        profile: what was measured.
        speeds: of the devices, beside what was planned for; 0.5 took twice as long.
        before_s: the step in the order so far.
        after_s: the step in the order that is run from now on.
        plan: that is run from now on; the stages are those from before.
        other: the best plan that a search finds, which may have other stages; `plan` if costs are
            estimated, since then nobody knows whether a device is slow or its layers are.
        other_s: its step.
        costs: of the layers, by what was measured; a trainer of `other` needs them to put transfers
            where they delay nothing.
        cluster: the devices, likewise.
        num_compilations: how many programs had to be compiled.
    """

    profile: Profile
    speeds: tuple[float, ...]
    before_s: float
    after_s: float
    plan: Plan
    other: Plan
    other_s: float
    costs: Costs
    cluster: Cluster
    num_compilations: int = 0

    @property
    def is_new(self) -> bool:
        """Whether the order is another."""
        return self.after_s < self.before_s

    def text(self) -> str:
        """Return what was seen, what was done, and what else would help."""
        speeds = ", ".join(f"{speed:.3g}" for speed in self.speeds)
        before, after, other = (
            f"{seconds * 1e3:.3f} ms" for seconds in (self.before_s, self.after_s, self.other_s)
        )
        lines = [f"the devices' speeds, beside what was planned for: {speeds}"]
        if self.is_new:
            lines.append(
                f"another order of tasks and transfers: {after} a step in place of {before}; "
                f"{self.num_compilations} programs were compiled for it"
            )
        else:
            lines.append(
                f"no order of these stages was found that is 2 % shorter than this, {before} a step"
            )
        if self.other_s < self.after_s * _WORTH_SAYING:
            lines.append(
                f"other stages would take {other}, {1 - self.other_s / self.after_s:.1%} less: "
                "save the parameters, and go on with the plan `other`, by `costs` and `cluster`"
            )
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.text()


def adapt(pipeline: Pipeline, costs: Costs, profile: Profile) -> tuple[Pipeline, Adaptation]:
    """Return the pipeline in its best order by what was measured, and what there is to say.

    Args:
        pipeline: that was measured.
        costs: of its layers, with the optimizer's state.
        profile: of its step.
    """
    analysis, plan, planned_for = pipeline.analysis, pipeline.plan, pipeline.analysis.cluster
    costs, cluster = observed(profile.timeline, plan, costs, planned_for)
    placed_by = analysis.costs, planned_for
    before = simulate(plan, costs, cluster, blocking=True, placed_by=placed_by)
    ordered = reorder(plan, costs, cluster)
    after = simulate(ordered, costs, cluster, blocking=True)
    if after.step_s > before.step_s * _WORTH_DOING:
        ordered, after = plan, before
    # What an estimate has wrong of a layer would be blamed on the layer's device.
    other = ordered if costs.source == "estimated" else _search(ordered, costs, cluster)
    adapted = replace(
        pipeline,
        analysis=replace(analysis, costs=costs, options=replace(analysis.options, cluster=cluster)),
        plan=ordered,
        timeline=after,
    )
    return adapted, Adaptation(
        profile=profile,
        speeds=tuple(
            now.speed / then.speed
            for now, then in zip(cluster.devices, planned_for.devices, strict=True)
        ),
        before_s=before.step_s,
        after_s=after.step_s,
        plan=ordered,
        other=other,
        other_s=simulate(other, costs, cluster, blocking=True).step_s,
        costs=costs,
        cluster=cluster,
    )


def _search(plan: Plan, costs: Costs, cluster: Cluster) -> Plan:
    """Return the best plan that is found, or the one given if none seems to fit the memory."""
    with suppress(ValueError):
        return best_plan(
            costs, cluster, plan.num_microbatches, others=[plan], time_limit_s=_SEARCH_S
        )
    return plan
