"""ZB-H2: no bubble between the first and the last task of a device, at twice the memory."""

from jaxptis.plan import Schedule, Task
from jaxptis.schedules.row import Row


def zb_h2(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule ZB-H2 of zero bubble (arXiv 2401.10241), one stage a device.

    Device r runs the weight gradient of a microbatch 2r microbatches after its input gradient.
    With M >= 2P - 1 microbatches on P devices, every device keeps 2P - 1. When F, I and W are
    equal, no device idles between its first and its last task: a step takes 3MF + (P - 1)F.
    """
    return tuple(_row(stage, num_devices, num_microbatches) for stage in range(num_devices))


def _row(stage: int, num_devices: int, num_microbatches: int) -> tuple[Task, ...]:
    row = Row()
    num_warmup = min(2 * (num_devices - stage) - 1, num_microbatches)
    row.run(stage, "F" * num_warmup)
    for microbatch in range(num_microbatches):
        row.run(stage, "I")
        if microbatch >= 2 * stage:
            row.run(stage, "W")
        if row.count(stage, "F") < num_microbatches:
            row.run(stage, "F")
    row.run(stage, "W" * min(2 * stage, num_microbatches))
    return tuple(row.tasks)
