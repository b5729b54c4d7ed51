"""What a device does with the seconds of a step in which it computes nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """The seconds in which a device computes nothing, by when that is, and its transfers.

    Attributes:
        warm_up_s: before its first task.
        steady_s: between its first and its last task.
        cool_down_s: after its last task.
        hidden_s: of its transfers, while it computes.
        exposed_s: of its transfers, while it does not; part of the three bubbles.
    """

    warm_up_s: float
    steady_s: float
    cool_down_s: float
    hidden_s: float
    exposed_s: float

    @property
    def idle_s(self) -> float:
        """All seconds without a task."""
        return self.warm_up_s + self.steady_s + self.cool_down_s
