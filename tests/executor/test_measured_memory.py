"""The memory of a step as it was run: by brute force over its instructions. No device needed."""

from dataclasses import replace
from random import Random

import pytest

from jaxptis.executor.instructions import Run
from jaxptis.executor.measured_memory import measured_memory
from jaxptis.executor.prove import prove
from tests.executor.test_measured import run
from tests.executor.test_random_lists import draw

NUM_PLANS = 100


def measured(seed):
    """Return lists, what is there at the start, sizes, accounts, happenings and curves."""
    rng = Random(seed)
    _, _, sizes, (rows, given, held) = draw(seed)
    accounts = [
        replace(account, temporary_bytes=tuple(rng.randint(0, 500) for _ in row))
        for account, row in zip(
            prove(rows, given=given, held=held, nbytes=sizes), rows.rows, strict=True
        )
    ]
    at = {(each.device, each.position): each for each in run(rng, rows)}
    return rows.rows, given, sizes, accounts, at, measured_memory(rows, at, accounts)


def tasks(row):
    return [i for i, each in enumerate(row) if isinstance(each, Run) and each.task is not None]


@pytest.mark.parametrize("seed", range(NUM_PLANS))
def test_what_is_there_at_every_moment(seed):
    rows, given, sizes, accounts, at, curves = measured(seed)
    ran = [at[device, i] for device, row in enumerate(rows) for i in tasks(row)]
    begin_s, end_s = min(each.start_s for each in ran), max(each.end_s for each in ran)
    for device, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        assert curve.times_s[0] == 0 and list(curve.times_s) == sorted(curve.times_s)
        assert curve.times_s[-1] <= end_s - begin_s
        # Where something ends as the next starts, what is there from then on is what counts.
        for time_s, num_bytes in dict(zip(curve.times_s, curve.num_bytes, strict=True)).items():
            live, inside = set(given[device]), 0
            for i, each in enumerate(row):
                if at[device, i].start_s - begin_s <= time_s:
                    live.update(each.writes)
                    running = time_s < at[device, i].end_s - begin_s
                    inside += accounts[device].temporary_bytes[i] * running
                    live.difference_update(() if running else each.frees)
            assert num_bytes == sum(sizes[name] for name in live) + inside


@pytest.mark.parametrize("seed", range(NUM_PLANS))
def test_the_peak_is_that_of_the_account(seed):
    """Lists of tasks alone have it between their first and their last."""
    rows, _, _, accounts, at, curves = measured(seed)
    ran = [at[device, i] for device, row in enumerate(rows) for i in tasks(row)]
    for device, (row, account, curve) in enumerate(zip(rows, accounts, curves, strict=True)):
        inside = all(
            min(each.start_s for each in ran) <= at[device, i].start_s
            and at[device, i].start_s <= max(each.end_s for each in ran)
            for i in range(len(row))
        )
        assert curve.peak_bytes <= account.peak_bytes
        if inside:
            assert curve.peak_bytes == account.peak_bytes
        assert sum(curve.peak_parts.values()) == curve.peak_bytes
