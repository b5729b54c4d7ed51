"""What the tasks of every stage cost."""

import math
from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Seconds of one task of each kind, for every stage.

    Raises:
        ValueError: the kinds have different numbers of stages, or seconds are negative or not
            finite.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    input_grad_s: tuple[float, ...]
    weight_grad_s: tuple[float, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if len(seconds) != len(self.forward_s):
                raise ValueError(
                    f"{field.name} has {len(seconds)} stages, but forward_s has "
                    f"{len(self.forward_s)}; make them equal"
                )
            for stage, each in enumerate(seconds):
                if not (math.isfinite(each) and each >= 0):
                    raise ValueError(
                        f"{field.name} of stage {stage} is {each}; use finite seconds of 0 or more"
                    )

    @classmethod
    def even(cls, num_stages: int) -> Self:
        """Return costs of one second for F, I and W, and of two for B."""
        one, two = (1.0,) * num_stages, (2.0,) * num_stages
        return cls(forward_s=one, backward_s=two, input_grad_s=one, weight_grad_s=one)

    @property
    def num_stages(self) -> int:
        return len(self.forward_s)

    def task_s(self, stage: int, kind: str) -> float:
        """Return the seconds of a task of kind F, B, I or W."""
        seconds = {
            "F": self.forward_s,
            "B": self.backward_s,
            "I": self.input_grad_s,
            "W": self.weight_grad_s,
        }
        return seconds[kind][stage]
