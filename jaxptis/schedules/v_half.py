"""V-Half: two stages a device, there and back, at about half the memory of 1F1B."""

from jaxptis.plan import Schedule
from jaxptis.schedules.building_block import Block, repeat, squeeze


def v_half(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule V-Half (arXiv 2405.15362) of 2P stages; device r has r and 2P - 1 - r.

    On P devices, each keeps at most P + 2 stage inputs, so P / 2 + 1 of its whole share of the
    model.
    """
    gap = 3 if num_devices % 2 == 0 else 0
    blocks = [
        Block(
            forward_there=2 * device,
            forward_back=3 * num_devices - 2 - device,
            input_grad_back=3 * num_devices - 1 + gap + 2 * device,
            input_grad_there=6 * num_devices - 2 + gap - device,
        )
        for device in range(num_devices)
    ]
    return squeeze(repeat(blocks, num_microbatches), max_kept=num_devices + 2)
