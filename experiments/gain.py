"""How much faster a plan is than interleaved 1F1B, predicted and measured."""

import dataclasses
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from rich.table import Table

PAPER = 1.42
"""The mean gain of AdaPtis over interleaved 1F1B, on GPUs (arXiv 2509.23722)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a plan.

    Attributes:
        strategy: of the plan.
        num_stages: of the plan.
        predicted_s: of the step.
        measured_s: likewise, the median of those recorded.
    """

    strategy: str
    num_stages: int
    predicted_s: float
    measured_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """Two steps of a model on the same devices.

    Attributes:
        model: the family.
        num_devices: of the pipeline.
        num_microbatches: of a step.
        interleaved: of interleaved 1F1B.
        best: of the plan that is set beside it.
    """

    model: str
    num_devices: int
    num_microbatches: int
    interleaved: Step
    best: Step

    @property
    def predicted(self) -> float:
        """How many times as long the interleaved step takes as the best one, as predicted."""
        return self.interleaved.predicted_s / self.best.predicted_s

    @property
    def measured(self) -> float:
        """Likewise, as measured."""
        return self.interleaved.measured_s / self.best.measured_s

    @property
    def ratio(self) -> float:
        """The predicted over the measured gain."""
        return self.predicted / self.measured

    def to_json(self) -> dict[str, Any]:
        """Returns the steps and the gains."""
        gains = {"predicted": self.predicted, "measured": self.measured, "ratio": self.ratio}
        return dataclasses.asdict(self) | gains


def means(gains: Sequence[Gain]) -> dict[str, float]:
    """Returns the geometric means, and by how much predicted gains are off at most."""
    return {
        "predicted": geometric_mean(gain.predicted for gain in gains),
        "measured": geometric_mean(gain.measured for gain in gains),
        "least_measured": min(gain.measured for gain in gains),
        "worst_error": max(abs(gain.ratio - 1) for gain in gains),
    }


def conclusion(gains: Sequence[Gain]) -> str:
    """Returns the means in words, beside the paper's."""
    of = means(gains)
    return (
        f"best over interleaved 1F1B, geometric mean: {of['measured']:.3f} measured, "
        f"{of['predicted']:.3f} predicted (the paper: {PAPER} on GPUs); least "
        f"{of['least_measured']:.3f} measured; predicted gains are off by "
        f"{of['worst_error']:.1%} at most"
    )


def table(gains: Sequence[Gain], title: str | None) -> Table:
    """Returns a line a gain, with both of its steps."""
    lines = Table(
        *("model", "devices", "microbatches"),
        *("interleaved", "stages", "predicted", "measured"),
        *("best", "stages", "predicted", "measured"),
        *("gain", "predicted", "measured", "ratio"),
        box=None,
        title=title,
    )
    for gain in gains:
        lines.add_row(
            *(gain.model, str(gain.num_devices), str(gain.num_microbatches)),
            *("", *_cells(gain.interleaved)),
            *("", *_cells(gain.best)),
            *("", f"{gain.predicted:.3f}", f"{gain.measured:.3f}", f"{gain.ratio:.3f}"),
        )
    return lines


def _cells(step: Step) -> tuple[str, str, str]:
    seconds = step.predicted_s, step.measured_s
    predicted, measured = (f"{each * 1e3:.1f} ms" for each in seconds)
    return str(step.num_stages), predicted, measured
