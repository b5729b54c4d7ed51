"""DualPipeV: two stages a device, there and back; a forward of one with a backward of the other."""

from jaxptis.plan import Schedule, Task
from jaxptis.schedules.row import Row


def dualpipe_v(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule DualPipeV of 2P stages; device r has r and 2P - 1 - r.

    The V-shaped half of DualPipe (DeepSeek-V3, arXiv 2412.19437), in its eight phases. Where the
    original overlaps a forward of one stage with a backward of the other, the two tasks stand next
    to each other here.

    With M microbatches on P devices, every device keeps 2P + 1 stage inputs, so P + 1/2 of its
    whole share of the model.

    Raises:
        ValueError: there are fewer than 2P microbatches.
    """
    if num_microbatches < 2 * num_devices:
        raise ValueError(
            f"{num_microbatches} microbatches are too few for 'dualpipe-v' on {num_devices} "
            f"devices; raise num_microbatches to {2 * num_devices} or more, or pass fewer devices"
        )
    return tuple(_row(device, num_devices, num_microbatches) for device in range(num_devices))


def _row(device: int, num_devices: int, num_microbatches: int) -> tuple[Task, ...]:
    there, back = device, 2 * num_devices - 1 - device
    to_turn = num_devices - 1 - device
    row = Row()
    row.run(there, "F" * (2 * to_turn))
    for _ in range(device + 1):
        row.run(there, "F")
        row.run(back, "F")
    row.run(back, "IWF" * to_turn)
    for _ in range(num_microbatches - 2 * num_devices + device + 1):
        _run_pair(row, forward=there, backward=back)
        _run_pair(row, forward=back, backward=there)
    for _ in range(to_turn):
        row.run(back, "B")
        _run_pair(row, forward=back, backward=there)
    # The first backwards of this phase are whole, the rest are split: half of the phase each.
    for index in range(2 * (device + 1)):
        row.run(there if index % 2 else back, "B" if index < device + 1 else "I")
    for _ in range(to_turn):
        row.run_oldest_weight_grad()
        row.run(there, "I")
    for _ in range(device + 1):
        row.run_oldest_weight_grad()
    return tuple(row.tasks)


def _run_pair(row: Row, *, forward: int, backward: int) -> None:
    row.run(forward, "F")
    row.run(backward, "B")
