"""ZB-H1: 1F1B with a split backward; weight gradients fill the holes at equal memory."""

from jaxptis.plan import Schedule, Task
from jaxptis.schedules.row import Row


def zb_h1(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule ZB-H1 of zero bubble (arXiv 2401.10241), one stage a device.

    Device r runs the weight gradient of a microbatch r microbatches after its input gradient.
    With M >= P microbatches on P devices, every device keeps P. When W takes neither longer than F
    nor than I, a step takes M (F + I + W) + (P - 1)(F + I - W).
    """
    return tuple(_row(stage, num_devices, num_microbatches) for stage in range(num_devices))


def _row(stage: int, num_devices: int, num_microbatches: int) -> tuple[Task, ...]:
    row = Row()
    num_warmup = min(num_devices - 1 - stage, num_microbatches)
    row.run(stage, "F" * num_warmup)
    for microbatch in range(num_microbatches):
        if row.count(stage, "F") < num_microbatches:
            row.run(stage, "F")
        row.run(stage, "I")
        if microbatch >= stage:
            row.run(stage, "W")
    row.run(stage, "W" * min(stage, num_microbatches))
    return tuple(row.tasks)
