"""What there is to say of every device of a timeline: the numbers of the tables and sentences."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from jaxptis.performance.bubbles import Bubble
from jaxptis.performance.memory import MemoryCurve
from jaxptis.performance.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a device does in a step.

    Attributes:
        device: its index.
        busy_s: that it computes.
        share: of the step that it computes.
        kind_s: seconds of its tasks, by kind.
        stage_s: seconds of its tasks, by stage, in the order of the model.
        bubble: when it does not compute, and what of its transfers is hidden.
        memory: over time; None if it is not known.
    """

    device: int
    busy_s: float
    share: float
    kind_s: Mapping[str, float]
    stage_s: Mapping[int, float]
    bubble: Bubble
    memory: MemoryCurve | None

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that it runs, in the order of the model."""
        return tuple(self.stage_s)


def device_facts(timeline: Timeline) -> tuple[DeviceFacts, ...]:
    """Return the facts of every device; the step takes some time."""
    step_s = timeline.step_s
    busy_s, bubbles, memory = timeline.busy_s, timeline.bubbles, timeline.memory
    facts = []
    for device, row in enumerate(timeline.spans):
        kind_s: defaultdict[str, float] = defaultdict(float)
        stage_s: defaultdict[int, float] = defaultdict(float)
        for task, start_s, end_s in row:
            kind_s[task.kind] += end_s - start_s
            stage_s[task.stage] += end_s - start_s
        facts.append(
            DeviceFacts(
                device=device,
                busy_s=busy_s[device],
                share=busy_s[device] / step_s,
                kind_s=dict(kind_s),
                stage_s=dict(sorted(stage_s.items())),
                bubble=bubbles[device],
                memory=memory[device] if memory else None,
            )
        )
    return tuple(facts)
