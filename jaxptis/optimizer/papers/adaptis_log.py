"""What a tuning did, step by step."""

from dataclasses import dataclass
from math import inf, isinf
from typing import Literal, Self

from jaxptis.performance import Timeline
from jaxptis.plan import Plan

Phase = Literal["partition", "placement", "schedule"]

_SHORTER = 1 - 1e-9  # by more than floats differ


@dataclass(frozen=True, kw_only=True)
class Step:
    """A move that was tried.

    Attributes:
        phase: that was taken for the bottleneck.
        move: what it changes.
        before_s: predicted seconds of a step without it.
        after_s: with it; infinite if no schedule was found that fits the memory.
        kept: whether it was kept, or rolled back.
    """

    phase: Phase
    move: str
    before_s: float
    after_s: float
    kept: bool

    @classmethod
    def of(cls, phase: Phase, move: str, before: Timeline, after: Timeline | None) -> Self:
        """Judge a move; there is no timeline after it if it does not fit the memory."""
        before_s, after_s = before.step_s, after.step_s if after else inf
        kept = after_s < before_s * _SHORTER
        return cls(phase=phase, move=move, before_s=before_s, after_s=after_s, kept=kept)

    @property
    def gain(self) -> float:
        """By what fraction a step is shorter with it; negative if it is longer."""
        return 1 - self.after_s / self.before_s


@dataclass(frozen=True)
class Log:
    """What was tried, in order.

    Attributes:
        start_s: predicted seconds of a step before all of it.
        steps: the moves.
    """

    start_s: float
    steps: tuple[Step, ...]

    def text(self) -> str:
        """Return a table: the phase, the predicted step with the move, and what became of it."""
        rows = [("phase", "step ms", "gain", "", "move")]
        rows += [("start", f"{self.start_s * 1e3:.3f}", "", "", "")]
        rows += [
            (
                step.phase,
                "no memory" if isinf(step.after_s) else f"{step.after_s * 1e3:.3f}",
                "" if isinf(step.after_s) else f"{step.gain:.2%}",
                "kept" if step.kept else "rolled back",
                step.move,
            )
            for step in self.steps
        ]
        lines = (f"{a:<9}  {b:>12}  {c:>8}  {d:<11}  {e}" for a, b, c, d, e in rows)
        return "".join(f"{line.rstrip()}\n" for line in lines)

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Adapted:
    """A plan, and how the tuning came to it."""

    plan: Plan
    log: Log
