"""V-Min: two stages a device, there and back, at about a third of the memory of 1F1B."""

from jaxptis.plan import Schedule
from jaxptis.schedules.building_block import Block, repeat


def v_min(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule V-Min (arXiv 2405.15362) of 2P stages; device r has r and 2P - 1 - r.

    On P devices, each keeps at most 2 (P + 4) / 3 stage inputs, so (P + 4) / 3 of its whole share
    of the model. Meant for F, I and W that are about equal: the holes that W fills have their size.
    """
    gap = 2 if num_devices % 3 == 0 else 0
    blocks = [
        Block(
            forward_there=device,
            forward_back=2 * num_devices - 1 - device,
            input_grad_back=2 * num_devices + gap + device,
            input_grad_there=4 * num_devices - 1 + gap - device,
        )
        for device in range(num_devices)
    ]
    return repeat(blocks, num_microbatches)
