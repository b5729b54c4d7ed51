"""The timeline: what every device does at which time, predicted or measured."""

from dataclasses import dataclass

from jaxptis.performance.bubbles import Bubble, bubble_of
from jaxptis.performance.memory import MemoryCurve
from jaxptis.performance.spans import Span, TransferSpan


@dataclass(frozen=True)
class Timeline:
    """What happens in a step.

    Attributes:
        spans: of every device its tasks, in the order it runs them.
        transfers: in the order in which they start.
        memory: of every device; empty if it is not known.
    """

    spans: tuple[tuple[Span, ...], ...]
    transfers: tuple[TransferSpan, ...] = ()
    memory: tuple[MemoryCurve, ...] = ()

    @property
    def step_s(self) -> float:
        """Seconds until the last device is done."""
        return max((span.end_s for row in self.spans for span in row), default=0.0)

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that every device computes."""
        return tuple(sum(span.end_s - span.start_s for span in row) for row in self.spans)

    @property
    def bubble(self) -> tuple[float, ...]:
        """The fraction of the step in which every device idles."""
        step_s = self.step_s
        return tuple(1 - busy_s / step_s if step_s else 0.0 for busy_s in self.busy_s)

    @property
    def bubbles(self) -> tuple[Bubble, ...]:
        """When every device idles, and what of its transfers is hidden."""
        transfers: list[list[TransferSpan]] = [[] for _ in self.spans]
        for each in self.transfers:
            transfers[each.source].append(each)
            transfers[each.target].append(each)
        step_s = self.step_s
        return tuple(
            bubble_of(row, moving, step_s)
            for row, moving in zip(self.spans, transfers, strict=True)
        )

    def text(self) -> str:
        """Return the step, and of every device its bubble and its tasks, times in milliseconds."""
        lines = [f"step {self.step_s * 1e3:.3f} ms"]
        for device, row in enumerate(self.spans):
            busy_ms, bubble = self.busy_s[device] * 1e3, self.bubble[device]
            lines += ["", f"device {device}: busy {busy_ms:.3f} ms, bubble {bubble:.1%}"]
            lines += [
                f"  {span.start_s * 1e3:12.3f} {span.end_s * 1e3:12.3f}  {span.task}"
                for span in row
            ]
        return "\n".join(lines) + "\n"
