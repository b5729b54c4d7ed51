"""Where families put their stages: for every stage, in order, its device."""


def loops(num_devices: int, num_loops: int) -> tuple[int, ...]:
    """Go through the devices from first to last, again and again.

    >>> loops(3, 2)
    (0, 1, 2, 0, 1, 2)
    """
    return tuple(range(num_devices)) * num_loops


def zigzag(num_devices: int, num_legs: int) -> tuple[int, ...]:
    """Go through the devices from first to last, back to the first, and so on.

    >>> zigzag(3, 2)
    (0, 1, 2, 2, 1, 0)
    """
    there = tuple(range(num_devices))
    legs = (there if leg % 2 == 0 else there[::-1] for leg in range(num_legs))
    return tuple(device for leg in legs for device in leg)
