"""Say in a sentence which device holds up the step and why, and which needs the most memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxptis.performance.timeline import Timeline
from jaxptis.pictures.facts import DeviceFacts, device_facts
from jaxptis.pictures.together import named
from jaxptis.pictures.words import and_list, duration, layer_names, percent, size
from jaxptis.plan import Plan

# A device whose work is above the mean by less than this is like the others: even a good partition
# leaves as much, since a layer is not cut.
_STANDS_OUT = 0.05
# Shares of the step below this are left out of sentences.
_WORTH_SAYING = 0.01


@dataclass(frozen=True)
class Bottleneck:
    """The device that holds up the others, None if all have like work, and a sentence on it."""

    device: int | None
    sentence: str


def find_bottleneck(timeline: Timeline, plan: Plan | None = None) -> Bottleneck:
    """Find the device with the most work, and what else the step is long for.

    No step is shorter than the work of its busiest device. So what that device has above the mean
    is what a better partition could save, and the time in which it idles is what a better placement
    or schedule, or more microbatches, could.

    Args:
        timeline: of the step.
        plan: names the layers.

    Raises:
        ValueError: the step takes no time, or the plan is another's.
    """
    named(timeline, None, plan)
    facts = device_facts(timeline)
    most = max(facts, key=lambda each: each.busy_s)
    if len(facts) == 1:
        return Bottleneck(None, f"The only device computes {percent(most.share)} of the step.")
    mean = sum(each.share for each in facts) / len(facts)
    above = most.share - mean
    if above <= _STANDS_OUT * mean:
        return Bottleneck(None, _of_none(facts, timeline.step_s))
    share, others, reason = percent(most.share), _others(most, facts), _heaviest_stage(most, plan)
    if above >= 1 - most.share:
        waits = "waits" if len(facts) == 2 else "wait"
        sentence = f"computes {share} of the step, {others} and {waits} for it: {reason}"
    else:
        idle = _idle([most], timeline.step_s)
        sentence = (
            f"has the most work, {share} of the step ({others}): {reason}. But it idles: {idle}"
        )
    return Bottleneck(most.device, f"Device {most.device} {sentence}.")


def _of_none(facts: Sequence[DeviceFacts], step_s: float) -> str:
    low, high = (percent(pick(each.share for each in facts)) for pick in (min, max))
    computes = f"each computes {low if low == high else f'{low} to {high}'} of the step"
    return f"No device holds up the others: {computes}; {_idle(facts, step_s)}."


def _others(most: DeviceFacts, facts: Sequence[DeviceFacts]) -> str:
    others = [each.share for each in facts if each is not most]
    if len(others) == 1:
        return f"the other {percent(others[0])}"
    return f"the others {percent(sum(others) / len(others))} on average"


def _heaviest_stage(facts: DeviceFacts, plan: Plan | None) -> str:
    """Say which stage takes the most of a device's time, with its layers."""
    stage, seconds = max(facts.stage_s.items(), key=lambda item: item[1])
    layers = layer_names(plan.stages[stage].layers) if plan else ""
    if len(facts.stages) == 1:
        return f"its only stage, {stage}, has {layers}" if plan else f"all of it is stage {stage}"
    names = f" ({layers})" if plan else ""
    return f"its stage {stage}{names} takes {percent(seconds / facts.busy_s)} of its time"


def _idle(facts: Sequence[DeviceFacts], step_s: float) -> str:
    """Say what the devices idle for, on average, the larger part first."""
    total_s = step_s * len(facts)
    ends = sum(each.bubble.warm_up_s + each.bubble.cool_down_s for each in facts) / total_s
    inside = sum(each.bubble.steady_s for each in facts) / total_s
    exposed = sum(each.bubble.exposed_s for each in facts) / total_s
    parts = [("warm-up and cool-down", ends), ("waits in between", inside)]
    parts.sort(key=lambda part: -round(part[1], 3))
    said = [f"{words} take {percent(share)}" for words, share in parts if share >= _WORTH_SAYING]
    if not said:
        return "hardly any of it is idle"
    mean = "on average " if len(facts) > 1 else ""
    transfers = f"; transfers are exposed for {percent(exposed)}"
    return mean + and_list(said) + (transfers if exposed >= _WORTH_SAYING else "")


def say_memory(timeline: Timeline) -> str:
    """Say which device needs the most memory, when, and for what; nothing if it is not known."""
    if not timeline.memory:
        return ""
    peaks = [curve.peak_bytes for curve in timeline.memory]
    device = peaks.index(max(peaks))
    curve = timeline.memory[device]
    parts = sorted(curve.peak_parts.items(), key=lambda item: -item[1])
    said = [f"{name} {size(num_bytes)}" for name, num_bytes in parts if num_bytes]
    needs = f"{size(curve.peak_bytes)} at {duration(curve.peak_s)}"
    needs += f": {and_list(said)}" if said else ""
    if len(peaks) > 1 and min(peaks) == max(peaks):
        return f"All devices need equal memory at their peaks, device {device} {needs}."
    return f"Device {device} needs the most memory, {needs}."
