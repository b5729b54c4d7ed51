"""The task: what one stage does with one microbatch."""

import re
from dataclasses import dataclass
from typing import Self

KINDS = "FBIW"
"""F forward, B full backward, I input gradient, W weight gradient."""

_KINDS = tuple(KINDS)

# Nine digits, so that a slip of the finger is a bad task and not a microbatch of astronomic number.
_TASK = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Task:
    """Work of one kind of one stage on one microbatch; `str` gives `<stage><KIND><microbatch>`.

    >>> str(Task(0, "F", 3))
    '0F3'
    >>> Task.parse("0F3")
    Task(stage=0, kind='F', microbatch=3)
    """

    stage: int
    kind: str
    microbatch: int

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"task kind {self.kind!r} is not known; use one of {', '.join(KINDS)}")
        if self.stage < 0 or self.microbatch < 0:
            raise ValueError(
                f"task {self} has a negative number; count stages and microbatches from 0"
            )

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the form that `str` writes.

        Raises:
            ValueError: `text` is not `<stage><KIND><microbatch>`.
        """
        match = _TASK.fullmatch(text)
        if match is None:
            raise ValueError(
                f"bad task: found {text!r}, expected <stage><KIND><microbatch> such as 0F3, "
                f"with KIND one of {', '.join(KINDS)}"
            )
        stage, kind, microbatch = match.groups()
        return cls(int(stage), kind, int(microbatch))


Schedule = tuple[tuple[Task, ...], ...]
"""The tasks of every device in the order it runs them: one row a device, row 0 for device 0."""
