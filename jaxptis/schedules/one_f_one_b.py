"""1F1B: the forwards that fill the pipeline, then a forward and a backward in turn."""

from jaxptis.plan import Schedule, Task


def one_f_one_b(*, num_devices: int, num_microbatches: int) -> Schedule:
    """Make the schedule of PipeDream-Flush (arXiv 2006.09503), one stage a device.

    With M microbatches on P devices, a step takes (M + P - 1)(F + B) as in GPipe, but device r
    keeps min(P - r, M) microbatches.
    """
    return tuple(
        _row(stage, min(num_devices - 1 - stage, num_microbatches), num_microbatches)
        for stage in range(num_devices)
    )


def _row(stage: int, num_warmup: int, num_microbatches: int) -> tuple[Task, ...]:
    forwards = [Task(stage, "F", m) for m in range(num_microbatches)]
    backwards = [Task(stage, "B", m) for m in range(num_microbatches)]
    num_steady = num_microbatches - num_warmup
    steady = zip(forwards[num_warmup:], backwards[:num_steady], strict=True)
    return (
        *forwards[:num_warmup],
        *(task for pair in steady for task in pair),
        *backwards[num_steady:],
    )
