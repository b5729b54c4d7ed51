"""The timeline: when every task starts and ends on its device."""

from dataclasses import dataclass

from jaxptis.plan import Task


@dataclass(frozen=True, kw_only=True)
class Span:
    """A task and the seconds, from the start of the step, at which it starts and ends."""

    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The spans of every device, in the order it runs them."""

    spans: tuple[tuple[Span, ...], ...]

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
