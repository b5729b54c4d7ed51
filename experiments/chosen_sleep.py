"""The flags that let the tasks of a step sleep in place of computing."""

from typing import Any

import jax
from absl import app, flags

from experiments import distributed

ASLEEP = flags.DEFINE_bool("asleep", False, "Let tasks sleep for what they cost.")
SLOWER = flags.DEFINE_float(
    "slower", 1.0, "How many times as long they sleep, with --asleep.", lower_bound=0.0
)


@flags.multi_flags_validator(["asleep", "slower"], "--slower is for --asleep; give both")
def _is_asleep(values: dict[str, Any]) -> bool:
    return bool(values["asleep"]) or values["slower"] == 1.0


def join(num_devices: int) -> list[jax.Device]:
    """Joins the processes that the flags name, if any; one alone has tasks that sleep.

    Raises:
      ValueError: there are fewer devices than `num_devices`.
    """
    devices = distributed.join(num_devices)
    if ASLEEP.value and jax.process_count() > 1:
        raise app.UsageError("--asleep is for one process, whose cores hold all devices")
    return devices


def sleep_title() -> str | None:
    """Returns what stands above a table of steps that sleep."""
    return "Tasks sleep for what they cost: these are times of no model" if ASLEEP.value else None
