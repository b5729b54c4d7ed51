"""ZB-V: two stages a device, there and back; no bubble inside at the memory of 1F1B."""

from jaxptis.plan import Schedule, Task
from jaxptis.schedules.row import Row


def zb_v(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule ZB-V (arXiv 2405.15362) of 2P stages; device r has r and 2P - 1 - r.

    Per device the step has warm-up, a steady phase of five or six tasks, and cool-down. Fewer than
    2P - 1 microbatches run in the order of 2P - 1, without those that are missing.

    With M >= 2P - 1 microbatches on P devices, every device keeps 2P stage inputs, so P of its
    whole share of the model. When F, I and W are equal, no device idles between its first and its
    last task: a step takes M (F + I + W) + (P - 1)F / 2, in seconds of both stages of a device.
    """
    length = max(2 * num_devices - 1, num_microbatches)
    rows = (_row(device, num_devices, length) for device in range(num_devices))
    return tuple(tuple(task for task in row if task.microbatch < num_microbatches) for row in rows)


def _row(device: int, num_devices: int, num_microbatches: int) -> list[Task]:
    there, back = device, 2 * num_devices - 1 - device
    to_turn = num_devices - device
    row = Row()
    row.run(there, "F" * (2 * to_turn - 1))
    for _ in range(device):
        row.run(back, "F")
        row.run(there, "F")
    row.run(back, "FIW" * to_turn)
    while row.count(back, "F") < num_microbatches:
        if row.count(there, "F") < num_microbatches:
            row.run(there, "F")
        row.run(there, "IW")
        row.run(back, "FIW")
    for _ in range(device):
        row.run(there, "I")
        row.run(back, "I")
    row.run(there, "IW" * to_turn)
    row.run(back, "W" * device)
    row.run(there, "W" * device)
    return row.tasks
