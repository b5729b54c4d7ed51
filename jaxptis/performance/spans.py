"""From when to when: a task on its device, a transfer between two."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxptis.plan import Task


class Span(NamedTuple):
    """A task and the seconds, from the start of the step, at which it starts and ends."""

    task: Task
    start_s: float
    end_s: float


class TransferSpan(NamedTuple):
    """What goes from a device to another, and the seconds at which that starts and ends.

    Attributes:
        source: the device that sends.
        target: the device that receives.
        made_by: the task whose result is sent, an F or a backward.
        reader: the stage that reads it.
        start_s: from the start of the step.
        end_s: when it is there.
        num_bytes: that are sent.
    """

    source: int
    target: int
    made_by: Task
    reader: int
    start_s: float
    end_s: float
    num_bytes: int


Rows = Sequence[Sequence[Span]]
"""The tasks of every device, in the order it runs them."""
