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
# A device with less work than the busiest by less than this is as busy.
_ALIKE = 0.01
# Shares of the step, or of the memory at its peak, below this are left out of sentences.
_WORTH_SAYING = 0.01


@dataclass(frozen=True)
class Bottleneck:
    """The devices that hold up the others, none if all have like work, and a sentence on them."""

    devices: tuple[int, ...]
    sentence: str


def find_bottleneck(timeline: Timeline, plan: Plan | None = None) -> Bottleneck:
    """Find the devices with the most work, and what else the step is long for.

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
    if len(facts) == 1:
        return Bottleneck((), f"The only device computes {percent(facts[0].share)} of the step.")
    most_s = max(each.busy_s for each in facts)
    mean_s = sum(each.busy_s for each in facts) / len(facts)
    if most_s - mean_s <= _STANDS_OUT * mean_s:
        return Bottleneck((), _of_none(facts, timeline.step_s))
    busiest = [each for each in facts if each.busy_s >= most_s * (1 - _ALIKE)]
    devices = tuple(each.device for each in busiest)
    return Bottleneck(devices, _of_busiest(busiest, facts, timeline.step_s, plan))


def _of_none(facts: Sequence[DeviceFacts], step_s: float) -> str:
    low, high = (percent(pick(each.share for each in facts)) for pick in (min, max))
    computes = f"each computes {low if low == high else f'{low} to {high}'} of the step"
    return f"No device holds up the others: {computes}; {_idle(facts, step_s)}."


def _of_busiest(
    busiest: Sequence[DeviceFacts], facts: Sequence[DeviceFacts], step_s: float, plan: Plan | None
) -> str:
    first, *like = busiest
    rest = [each.share for each in facts if each not in busiest]
    share = percent(first.share) + " of the step" + _like([each.device for each in like])
    others = _others(rest)
    reason = _heaviest_stage(first, plan)
    mean = sum(each.share for each in facts) / len(facts)
    if first.share - mean < 1 - first.share:
        has = f"has the most work, {share} ({others})"
        return f"Device {first.device} {has}: {reason}. But it idles: {_idle([first], step_s)}."
    waits = f"{'waits' if len(rest) == 1 else 'wait'} for {'them' if like else 'it'}"
    return f"Device {first.device} computes {share}, {others} and {waits}: {reason}."


def _like(devices: Sequence[int]) -> str:
    """Say which others are as busy; those that follow one another by the first and the last."""
    if not devices:
        return ""
    low, high = devices[0], devices[-1]
    if len(devices) > 2 and high - low == len(devices) - 1:
        return f", as do devices {low} to {high}"
    words = "as does device" if len(devices) == 1 else "as do devices"
    return f", {words} {and_list([str(each) for each in devices])}"


def _others(shares: Sequence[float]) -> str:
    if len(shares) == 1:
        return f"the other {percent(shares[0])}"
    return f"the others {percent(sum(shares) / len(shares))} on average"


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
    least = max(1, _WORTH_SAYING * curve.peak_bytes)
    said = [f"{name} {size(num_bytes)}" for name, num_bytes in parts if num_bytes >= least]
    needs = f"{size(curve.peak_bytes)} at {duration(curve.peak_s)}"
    needs += f": {and_list(said)}" if said else ""
    if len(peaks) > 1 and min(peaks) == max(peaks):
        return f"All devices need equal memory at their peaks, device {device} {needs}."
    return f"Device {device} needs the most memory, {needs}."
