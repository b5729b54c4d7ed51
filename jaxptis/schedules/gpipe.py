"""GPipe: all forwards, then all backwards."""

from jaxptis.plan import Schedule, Task


def gpipe(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule of GPipe (arXiv 1811.06965), one stage a device.

    With M microbatches on P devices, a step takes (M + P - 1)(F + B), and every device keeps M
    microbatches.
    """
    return tuple(
        tuple(Task(stage, kind, m) for kind in "FB" for m in range(num_microbatches))
        for stage in range(num_devices)
    )
