"""Instruction lists of random plans: proven, or refused if a fault is planted. No device needed."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from experiments.random_plan import random_plan
from jaxptis.executor.instructions import Run, Transfer
from jaxptis.executor.memory import predict_memory
from jaxptis.executor.prove import prove
from tests.executor.random_tasks import random_costs, random_programs, write_rows

NUM_PLANS, CHUNKS = 5000, 5


def draw(seed):
    """Return a plan, its programs, the size of each buffer, and the lists of its step."""
    rng = Random(seed)
    plan = random_plan(rng)
    programs = random_programs(rng, plan)
    refs = {ref for each in programs.values() for ref in (*each.reads, *each.writes)}
    names = sorted({ref.name for ref in refs})
    sizes = dict(zip(names, rng.sample(range(1, 1000), len(names)), strict=True))
    for ref in refs:
        sizes.update({ref.of(m): sizes[ref.name] for m in range(plan.num_microbatches)})
    return plan, programs, sizes, write_rows(plan, programs, random_costs(rng, plan))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_plans_are_proven(chunk):
    for seed in range(chunk, NUM_PLANS, CHUNKS):
        plan, programs, sizes, (rows, given, held) = draw(seed)
        accounts = prove(rows, given=given, held=held, nbytes=sizes)
        peaks = tuple(each.peak_bytes for each in accounts)
        wanted = {t for row in plan.schedule for t in row if (t.stage, t.kind) in programs}
        for device, row in enumerate(rows.rows):
            ran = [each.task for each in row if isinstance(each, Run)]
            assert ran == [task for task in plan.schedule[device] if task in wanted]
            assert peaks[device] == most_live(row, given[device], held[device], sizes)
        lasting = set().union(*given)
        passing = {name: size for name, size in sizes.items() if name not in lasting}
        resident = [sum(sizes[name] for name in names) for names in given]
        assert tuple(x.peak_bytes for x in predict_memory(rows, passing, resident)) == peaks


def most_live(row, given, held, sizes):
    """Count by hand: a buffer lives from its first use to its last, or for ever."""
    first = dict.fromkeys(given, 0)
    last = dict.fromkeys(held, len(row))
    for i, each in enumerate(row):
        for name in (*each.reads, *each.writes):
            first.setdefault(name, i)
            if name not in held:
                last[name] = i
    lives = [(first[name], last[name], sizes[name]) for name in first]
    return max(sum(n for a, b, n in lives if a <= i <= b) for i in range(len(row) + 1))


def positions(rows, kind, wanted=lambda each: True):
    """Return where instructions of a kind stand, as device and index."""
    return [
        (device, i)
        for device, row in enumerate(rows.rows)
        for i, each in enumerate(row)
        if isinstance(each, kind) and wanted(each)
    ]


def swap_transfers(rng, rows):
    """Exchange two transfers of a device that go to the same peer, at one end only."""
    pairs = [
        (device, i, j)
        for device, i in positions(rows, Transfer)
        for other, j in positions(rows, Transfer)
        if device == other and i < j and rows.rows[device][i].peer == rows.rows[device][j].peer
    ]
    if pairs:
        device, i, j = rng.choice(pairs)
        row = rows.rows[device]
        row[i], row[j] = row[j], row[i]
    return bool(pairs)


def lose_a_receive(rng, rows):
    places = positions(rows, Transfer, lambda each: each.receives)
    if places:
        device, i = rng.choice(places)
        transfer = rows.rows[device][i]
        rows.rows[device][i] = replace(transfer, receives=transfer.receives[1:])
        if not (transfer.receives[1:] or transfer.sends):
            del rows.rows[device][i]
    return bool(places)


def repeat_a_task(rng, rows):
    device, i = rng.choice(positions(rows, Run))
    rows.rows[device].insert(i, rows.rows[device][i])
    return True


def free_too_early(rng, rows):
    """Free a buffer where it is used before its last use."""
    places = [
        (device, i, name)
        for device, i in positions(rows, (Run, Transfer))
        for name in (*rows.rows[device][i].reads, *rows.rows[device][i].writes)
        if any(name in later.reads for later in rows.rows[device][i + 1 :])
    ]
    if places:
        device, i, name = rng.choice(places)
        each = rows.rows[device][i]
        rows.rows[device][i] = replace(each, frees=(*each.frees, name))
    return bool(places)


def forget_a_free(rng, rows):
    places = positions(rows, (Run, Transfer), lambda each: each.frees)
    if places:
        device, i = rng.choice(places)
        rows.rows[device][i] = replace(rows.rows[device][i], frees=())
    return bool(places)


FAULTS = {
    swap_transfers: "deadlock, the transfers wait for each other|waits forever",
    lose_a_receive: "deadlock, the transfers wait for each other|waits forever|was never made",
    repeat_a_task: "runs .* twice|is written while it is still in use|was freed before",
    free_too_early: "was freed before|is freed, but is not there",
    forget_a_free: "never freed|is written while it is still in use",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    planted = Counter()
    for seed in range(300):
        _, _, sizes, (rows, given, held) = draw(seed)
        if not fault(Random(seed), rows):
            continue
        planted[fault] += 1
        with pytest.raises(ValueError, match=FAULTS[fault]):
            prove(rows, given=given, held=held, nbytes=sizes)
    assert planted[fault] > 100
