"""Partition layers into stages so that the heaviest stage is as light as can be."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise


def balance(weights: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut layers into consecutive, non-empty stages of the smallest possible maximum weight.

    Among these, take the smallest sum of squares, so that the stages below the maximum are even
    too. Exact: floats are fractions, and are summed as such.

    >>> balance([1, 1, 1, 3, 1, 1], num_stages=3)
    (0, 3, 4, 6)

    Args:
        weights: the weight of every layer, in any unit, none negative.
        num_stages: how many stages to fill.

    Returns:
        The index of every stage's first layer, then the number of layers.

    Raises:
        ValueError: there are fewer layers than stages, or a weight is negative or not finite.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages is {num_stages}; use 1 or more")
    if len(weights) < num_stages:
        raise ValueError(
            f"{len(weights)} layers cannot fill {num_stages} stages; "
            f"lower num_stages to {len(weights)} or less"
        )
    for layer, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"layer {layer} weighs {weight}; use a finite weight of 0 or more")
    prefix = _prefix_sums(weights)
    limit = _smallest_limit(prefix, num_stages)
    return _most_even(prefix, num_stages, limit)


def uniform(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Cut layers into stages of as many each, or of one more in the first ones.

    >>> uniform(7, num_stages=3)
    (0, 3, 5, 7)
    """
    few, more = divmod(num_layers, num_stages)
    return tuple(stage * few + min(stage, more) for stage in range(num_stages + 1))


def check_fills_devices(num_layers: int, num_devices: int) -> None:
    """Check that there is a layer for every device.

    Raises:
        ValueError: there is not.
    """
    if num_layers < num_devices:
        raise ValueError(
            f"{num_layers} layers cannot fill {num_devices} devices; pass {num_layers} or fewer"
        )


def _prefix_sums(weights: Sequence[float]) -> list[int]:
    """Return the exact weight of the first 0, 1, ... layers, in a unit that makes them integers."""
    exact = [Fraction(weight) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    return list(accumulate((int(weight * unit) for weight in exact), initial=0))


def _smallest_limit(prefix: list[int], num_stages: int) -> int:
    """Return the smallest limit under which `num_stages` stages hold all layers, by bisection.

    Stages filled greedily may be fewer than `num_stages`. Cutting one in two lowers the maximum or
    keeps it, so there is always a way to fill the rest.
    """
    low = max(after - before for before, after in pairwise(prefix))
    high = prefix[-1]
    while low < high:
        middle = (low + high) // 2
        if _reach(prefix, num_stages, middle)[-1] == len(prefix) - 1:
            high = middle
        else:
            low = middle + 1
    return low


def _reach(prefix: list[int], num_stages: int, limit: int) -> list[int]:
    """Return how many layers 0, 1, ... `num_stages` stages can hold."""
    reach = [0]
    for _ in range(num_stages):
        reach.append(bisect_right(prefix, prefix[reach[-1]] + limit) - 1)
    return reach


def _most_even(prefix: list[int], num_stages: int, limit: int) -> tuple[int, ...]:
    """Return the boundaries of the smallest sum of squares with no stage above `limit`.

    Dynamic programming over stages and ends. The best start of a last stage never moves left when
    its end moves right (squared sums satisfy the quadrangle inequality, and the limit only takes
    away starts from the left), so each row is solved by divide and conquer in O(n log n).
    """
    squares = {0: 0}
    starts: list[dict[int, int]] = []
    for stage, furthest in enumerate(_reach(prefix, num_stages, limit)[1:]):
        squares, start_of = _add_stage(squares, range(stage + 1, furthest + 1), prefix, limit)
        starts.append(start_of)
    boundaries = [len(prefix) - 1]
    for start_of in reversed(starts):
        boundaries.append(start_of[boundaries[-1]])
    return tuple(reversed(boundaries))


def _add_stage(
    squares: dict[int, int], ends: range, prefix: list[int], limit: int
) -> tuple[dict[int, int], dict[int, int]]:
    """Return, for every end of one more stage, the sum of squares and the stage's best start."""
    added: dict[int, int] = {}
    start_of: dict[int, int] = {}
    pending = [(ends, min(squares), max(squares))]
    while pending:
        part, first, last = pending.pop()
        if not part:
            continue
        half = len(part) // 2
        end = part[half]
        lightest = bisect_left(prefix, prefix[end] - limit)
        added[end], start = min(
            (squares[start] + (prefix[end] - prefix[start]) ** 2, start)
            for start in range(max(first, lightest), min(last, end - 1) + 1)
        )
        start_of[end] = start
        pending += [(part[:half], first, start), (part[half + 1 :], start, last)]
    return added, start_of
