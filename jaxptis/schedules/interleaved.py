"""Interleaved 1F1B: several stages a device, in loops, so that the pipeline fills sooner."""

from jaxptis.plan import Schedule, Task


def interleaved(
    *, num_devices: int, num_microbatches: int, v: int, group_size: int | None
) -> Schedule:
    """Make the interleaved 1F1B of Megatron-LM (arXiv 2104.04473), `v` stages a device.

    Stage s is on device s mod P. A device runs groups of `group_size` microbatches through its
    first stage, then the same through its second, and so on; backward from its last stage on.

    With M microbatches on P devices, in groups of G, device r keeps min(vM, 2 (P - 1 - r) +
    (v - 1) G + 1) stage inputs. When G is P, a step takes M (F + B) + (P - 1)(F + B) / v, in
    seconds of all stages of a device.

    Args:
        num_devices: P.
        num_microbatches: M.
        v: stages of a device.
        group_size: G, microbatches of a group. Every group must be full or have P or more
            (Megatron-LM's condition), and one group may hold all. None takes the smallest that
            fits: P where P divides M, and the one of torch.distributed.pipelining where that has
            one.

    Raises:
        ValueError: `group_size` does not fit.
    """
    sizes = [
        size
        for size in range(min(num_devices, num_microbatches), num_microbatches + 1)
        if num_microbatches % size == 0 or num_microbatches % size >= num_devices
    ]
    if group_size is None:
        group_size = sizes[0]
    if group_size not in sizes:
        near = sorted(sorted(sizes, key=lambda size: abs(size - group_size))[:2])
        raise ValueError(
            f"group_size {group_size} of 'interleaved' does not fit {num_microbatches} microbatches"
            f" on {num_devices} devices: every group needs {group_size} microbatches, the last "
            f"{num_devices} or more; use {' or '.join(map(str, near))}"
        )
    order = [
        (loop, microbatch)
        for start in range(0, num_microbatches, group_size)
        for loop in range(v)
        for microbatch in range(start, min(start + group_size, num_microbatches))
    ]
    return tuple(_row(device, num_devices, v, group_size, order) for device in range(num_devices))


def _row(
    device: int, num_devices: int, v: int, group_size: int, order: list[tuple[int, int]]
) -> tuple[Task, ...]:
    forwards = [Task(loop * num_devices + device, "F", m) for loop, m in order]
    backwards = [Task((v - 1 - loop) * num_devices + device, "B", m) for loop, m in order]
    num_warmup = min(2 * (num_devices - 1 - device) + (v - 1) * group_size, len(order))
    num_steady = len(order) - num_warmup
    steady = zip(forwards[num_warmup:], backwards[:num_steady], strict=True)
    return (
        *forwards[:num_warmup],
        *(task for pair in steady for task in pair),
        *backwards[num_steady:],
    )
