"""What devices do with their idle seconds, counted by hand and second by second."""

from random import Random

from jaxptis.performance import Bubble, Timeline, simulate
from tests.clusters import equal_devices
from tests.performance.random_steps import random_step
from tests.small_plans import layer_costs, named_plan


def test_counted_by_hand() -> None:
    """1F1B of two devices and microbatches, transfers of 1 s, marked > and <.

    device 0  F F . . . . B B . B B
                > >     <     <
    device 1  . . F B B F B B . . .
    """
    plan = named_plan("1f1b", 2, 2)
    timeline = simulate(plan, layer_costs(plan, lambda *_: 1), equal_devices(2, latency_s=1))
    assert timeline.bubbles == (
        Bubble(warm_up_s=0, steady_s=5, cool_down_s=0, hidden_s=1, exposed_s=3),
        Bubble(warm_up_s=2, steady_s=0, cool_down_s=3, hidden_s=2, exposed_s=2),
    )
    assert [bubble.idle_s for bubble in timeline.bubbles] == [5, 5]


def count(timeline: Timeline, device: int) -> Bubble:
    """Look at each second of a device: does a task run, does a transfer."""
    row = timeline.spans[device]
    seconds = range(round(timeline.step_s))
    busy = [any(span.start_s <= t < span.end_s for span in row) for t in seconds]
    moving = [
        any(
            each.start_s <= t < each.end_s
            for each in timeline.transfers
            if device in (each.source, each.target)
        )
        for t in seconds
    ]
    first = row[0].start_s if row else timeline.step_s
    last = row[-1].end_s if row else timeline.step_s
    idle = [t for t in seconds if not busy[t]]
    return Bubble(
        warm_up_s=sum(t < first for t in idle),
        steady_s=sum(first <= t < last for t in idle),
        cool_down_s=sum(t >= last for t in idle),
        hidden_s=sum(moving[t] and busy[t] for t in seconds),
        exposed_s=sum(moving[t] and not busy[t] for t in seconds),
    )


def test_counted_second_by_second() -> None:
    hidden = 0
    for seed in range(150):
        step = random_step(Random(seed))
        for blocking in False, True:
            timeline = simulate(step.plan, step.costs, step.cluster, blocking=blocking)
            for device, bubble in enumerate(timeline.bubbles):
                assert bubble == count(timeline, device), (seed, blocking, device)
                assert not (blocking and bubble.hidden_s)
                hidden += bubble.hidden_s > 0
    assert hidden > 50
