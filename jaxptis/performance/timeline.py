"""The timeline: what every device does at which time, predicted or measured."""

from dataclasses import dataclass
from os import PathLike

from jaxptis.performance.bubbles import Bubble, bubble_of
from jaxptis.performance.comparison import Comparison, compare
from jaxptis.performance.memory import MemoryCurve
from jaxptis.performance.spans import Span, TransferSpan
from jaxptis.plan import Plan


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

    def save(
        self,
        path: str | PathLike[str],
        *,
        measured: "Timeline | None" = None,
        plan: Plan | None = None,
        title: str = "",
    ) -> None:
        """Write a picture, in the form that the suffix of the path names.

        `.html`: a page for a browser, to zoom into and ask. `.json`: a trace for ui.perfetto.dev.
        `.png`, `.svg`, `.pdf`: a figure for a paper (pip install 'jaxptis[pictures]'). `.txt`: a
        chart of characters.

        Args:
            path: of the file.
            measured: what really ran, to stand beside this, the predicted timeline.
            plan: names the layers.
            title: of the picture.

        Raises:
            ValueError: the suffix is not known, the step takes no time, or the timelines and the
                plan are not of one pipeline.
        """
        from jaxptis.pictures.save import save  # pictures are of timelines

        save(path, self, measured=measured, plan=plan, title=title)

    def compare(self, other: "Timeline") -> Comparison:
        """Say where this timeline and another of the same plan part.

        Raises:
            ValueError: they have not the same stages on the same devices.
        """
        return compare(self, other)

    def text(self) -> str:
        """Return the step, and of every device its bubble and its tasks, times in milliseconds."""
        lines = [f"step {self.step_s * 1e3:.3f} ms"]
        facts = zip(self.spans, self.busy_s, self.bubble, strict=True)
        for device, (row, busy_s, bubble) in enumerate(facts):
            lines += ["", f"device {device}: busy {busy_s * 1e3:.3f} ms, bubble {bubble:.1%}"]
            lines += [
                f"  {span.start_s * 1e3:12.3f} {span.end_s * 1e3:12.3f}  {span.task}"
                for span in row
            ]
        return "\n".join(lines) + "\n"
