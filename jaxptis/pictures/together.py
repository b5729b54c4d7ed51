"""Which timelines a picture shows, and that they and the plan belong together."""

from jaxptis.performance.timeline import Timeline
from jaxptis.plan import Plan


def named(
    timeline: Timeline, measured: Timeline | None, plan: Plan | None = None
) -> dict[str, Timeline]:
    """Return the timelines by the names that they have in a picture; one alone needs none.

    Raises:
        ValueError: the step takes no time; or the timelines, or one and the plan, differ in which
            device has which stage.
    """
    if measured is None:
        given = {"": timeline}
    else:
        given = {"predicted": timeline, "measured": measured}
        if len(measured.spans) != len(timeline.spans):
            raise ValueError(
                f"the measured timeline has {len(measured.spans)} devices, the predicted "
                f"{len(timeline.spans)}; give two timelines of one plan"
            )
    for name, each in given.items():
        what = f"the {name} timeline" if name else "the timeline"
        if not each.step_s:
            raise ValueError(
                f"{what} takes 0 s, so there is nothing to see; give its tasks some time"
            )
        if plan is not None:
            _check_is_of(each, plan, what)
    return given


def _check_is_of(timeline: Timeline, plan: Plan, what: str) -> None:
    if plan.num_devices != len(timeline.spans):
        raise ValueError(
            f"{what} has {len(timeline.spans)} devices, the plan {plan.num_devices}; give the plan "
            "that it is of"
        )
    for device, row in enumerate(timeline.spans):
        for stage in sorted({span.task.stage for span in row}):
            if stage >= plan.num_stages or plan.stages[stage].device != device:
                raise ValueError(
                    f"in {what} device {device} runs stage {stage}, in the plan it does not; give "
                    "the plan that the timeline is of"
                )
