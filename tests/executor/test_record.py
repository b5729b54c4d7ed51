"""Instructions are run in the order of each device, and nobody waits for one that failed."""

import threading
from random import Random

import pytest

from jaxptis.executor.prove import in_one_order
from jaxptis.executor.record import Job, record
from tests.executor.test_random_lists import draw


def jobs_of(rows, run):
    return [
        Job(
            ends=tuple(
                (device, position)
                for (device, _), position in zip(step.ends, step.positions, strict=True)
            ),
            run=lambda step=step: run(step),
        )
        for step in in_one_order(rows)
    ]


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_instruction_is_run_once_in_the_order_of_its_device(seed, in_turn):
    _, _, _, (rows, _, _) = draw(seed)
    ran, lock = [], threading.Lock()

    def run(step):
        with lock:
            ran.append(step)

    happenings = record(jobs_of(rows, run), in_turn=in_turn)
    assert len(ran) == len(in_one_order(rows)) == len(set(map(id, ran)))
    by_device = [[each for each in happenings if each.device == d] for d in range(len(rows.rows))]
    for device, row in enumerate(rows.rows):
        own = by_device[device]
        assert [each.position for each in own] == list(range(len(row)))
        steps = [step for step in ran if device in dict(step.ends)]
        assert [step.positions[[d for d, _ in step.ends].index(device)] for step in steps] == [
            each.position for each in own
        ]
        times = [time for each in own for time in (each.start_s, each.end_s)]
        assert times == sorted(times)


@pytest.mark.parametrize("in_turn", [False, True])
def test_two_devices_work_at_once_if_each_has_a_thread(in_turn):
    barrier = threading.Barrier(2, timeout=0.2 if in_turn else 60)
    jobs = [Job(ends=((device, 0),), run=barrier.wait) for device in range(2)]
    if in_turn:
        with pytest.raises(threading.BrokenBarrierError):
            record(jobs, in_turn=True)
    else:
        assert len(record(jobs, in_turn=False)) == 2


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_what_fails_is_raised_and_nobody_waits(seed, in_turn):
    _, _, _, (rows, _, _) = draw(seed)
    steps = in_one_order(rows)
    failing = Random(seed).choice(steps)

    def run(step):
        if step == failing:
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        record(jobs_of(rows, run), in_turn=in_turn)
