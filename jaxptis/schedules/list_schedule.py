"""List schedule: the tasks of any placement in an order made for their costs."""

from collections.abc import Sequence

from jaxptis.plan import Schedule, Task
from jaxptis.plan.order import execution_order, needs
from jaxptis.schedules.greedy import Rule, greedy
from jaxptis.schedules.stage_costs import StageCosts


def list_schedule(
    placement: Sequence[int],
    costs: StageCosts,
    num_microbatches: int,
    *,
    transfer_s: float = 0.0,
    in_flight: int | None = None,
) -> Schedule:
    """Make the shortest of some greedy schedules; the rule is that of AdaPtis (arXiv 2509.23722).

    A device prefers the input gradient, takes forward and backward in turn, and fills holes with
    weight gradients. Orders made for even costs are tried too: under tight memory they are the
    more regular ones, and often shorter. So are whole backwards, where a split one takes longer:
    in all microbatches, or in all but the last P, whose split shortens the end of the step.

    Args:
        placement: the device of every stage. Devices may have several, and different numbers.
        costs: the seconds of every stage.
        num_microbatches: how many run through every stage.
        transfer_s: seconds until a result is on another device.
        in_flight: microbatches that a device may keep for each of its stages, on average; from a
            forward until its whole backward or its weight gradient. None sets no limit.

    Raises:
        ValueError: a number is too small, a device has no stage, or the costs are not those of as
            many stages.
    """
    num_devices = max(placement, default=-1) + 1
    _check(placement, costs, num_microbatches, in_flight)
    even = StageCosts.even(costs.num_stages)
    candidates = (
        greedy(
            placement,
            order_costs,
            num_microbatches,
            Rule(
                in_flight=in_flight or num_microbatches,
                num_whole=num_whole,
                alternate=True,
                limit_ahead=limit_ahead,
            ),
            order_transfer_s,
        )
        for num_whole in _nums_whole(costs, num_microbatches, num_devices)
        for order_costs, order_transfer_s, limit_ahead in (
            (costs, transfer_s, False),
            (even, 0.0, False),
            (even, 0.0, True),
        )
    )
    return min(candidates, key=lambda rows: step_s(rows, placement, costs, transfer_s))


def _nums_whole(costs: StageCosts, num_microbatches: int, num_devices: int) -> tuple[int, ...]:
    """Return how many microbatches may have a whole backward; none where a split costs nothing."""
    columns = zip(costs.backward_s, costs.input_grad_s, costs.weight_grad_s, strict=True)
    if all(whole >= first + second for whole, first, second in columns):
        return (0,)
    return tuple(sorted({0, max(0, num_microbatches - num_devices), num_microbatches}))


def step_s(
    schedule: Schedule, placement: Sequence[int], costs: StageCosts, transfer_s: float = 0.0
) -> float:
    """Return the seconds of a step in which every task starts as soon as it can."""
    tasks = frozenset(task for row in schedule for task in row)
    end_s: dict[Task, float] = {}
    free_s = [0.0] * len(schedule)
    for task in execution_order(schedule):
        device = placement[task.stage]
        arrivals = (
            end_s[need] + (transfer_s if placement[need.stage] != device else 0.0)
            for need in needs(task, tasks)
        )
        end_s[task] = max([free_s[device], *arrivals]) + costs.task_s(task.stage, task.kind)
        free_s[device] = end_s[task]
    return max(free_s)


def _check(
    placement: Sequence[int], costs: StageCosts, num_microbatches: int, in_flight: int | None
) -> None:
    if not placement or set(placement) != set(range(max(placement) + 1)):
        raise ValueError(
            f"placement {list(placement)} leaves a device without a stage; count devices from 0 "
            "and give each a stage"
        )
    if costs.num_stages != len(placement):
        raise ValueError(
            f"the costs are of {costs.num_stages} stages, but the placement has {len(placement)}; "
            "give the costs of every stage"
        )
    for what, number in ("num_microbatches", num_microbatches), ("in_flight", in_flight):
        if number is not None and number < 1:
            raise ValueError(f"{what} is {number}; use 1 or more")
