"""The fixed schedules, by name."""

from difflib import get_close_matches
from typing import Protocol

from jaxptis.plan import Schedule
from jaxptis.schedules.gpipe import gpipe
from jaxptis.schedules.one_f_one_b import one_f_one_b

__all__ = ["FAMILIES", "Family", "schedule"]


class Family(Protocol):
    """Makes a schedule for any number of devices, one stage a device, and of microbatches."""

    def __call__(self, *, num_devices: int, num_microbatches: int) -> Schedule: ...


FAMILIES: dict[str, Family] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def schedule(name: str, *, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule of a family.

    >>> schedule("1f1b", num_devices=2, num_microbatches=1)[1]
    (Task(stage=1, kind='F', microbatch=0), Task(stage=1, kind='B', microbatch=0))

    Raises:
        ValueError: the name is not known, or a number is below 1.
    """
    if name not in FAMILIES:
        close = get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"schedule {name!r} is not known; {hint}use one of {', '.join(map(repr, FAMILIES))}"
        )
    for what, number in ("num_devices", num_devices), ("num_microbatches", num_microbatches):
        if number < 1:
            raise ValueError(f"{what} is {number}; use 1 or more")
    return FAMILIES[name](num_devices=num_devices, num_microbatches=num_microbatches)
