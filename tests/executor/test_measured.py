"""From when instructions were run, each on its process's clock, to a timeline. No device needed."""

from dataclasses import replace
from random import Random

import pytest

from jaxptis.executor.instructions import Run
from jaxptis.executor.measured import on_one_clock, timeline_of
from jaxptis.executor.prove import in_one_order
from jaxptis.executor.record import Happening
from tests.executor.test_random_lists import draw

NUM_PLANS = 200


def run(rng, rows):
    """Return when each instruction is run, if each takes a random time and transfers block."""
    free_s = [rng.random() for _ in rows.rows]
    happenings = []
    for step in in_one_order(rows):
        devices = [device for device, _ in step.ends]
        over_s = max(free_s[device] for device in devices) + rng.random()
        for device, position in zip(devices, step.positions, strict=True):
            end_s = over_s + rng.choice((0, rng.random()))  # an end may learn of it late
            happenings.append(
                Happening(device=device, position=position, start_s=free_s[device], end_s=end_s)
            )
            free_s[device] = end_s + rng.choice((0, 0.1 * rng.random()))
    return happenings


@pytest.mark.parametrize("seed", range(NUM_PLANS))
def test_a_timeline_has_every_task_and_what_crosses(seed):
    plan, programs, sizes, (rows, _, _) = draw(seed)
    happenings = run(Random(seed), rows)
    at = {(each.device, each.position): each for each in happenings}
    timeline = timeline_of(rows, at, sizes)

    first_s = min(
        each.start_s
        for each in happenings
        if isinstance(instruction := rows.rows[each.device][each.position], Run)
        and instruction.task is not None
    )
    for device, (row, spans) in enumerate(zip(rows.rows, timeline.spans, strict=True)):
        wanted = [
            (each.task, at[device, i].start_s - first_s, at[device, i].end_s - first_s)
            for i, each in enumerate(row)
            if isinstance(each, Run) and each.task is not None
        ]
        assert [tuple(span) for span in spans] == wanted
    span_of = {span.task: span for row in timeline.spans for span in row}
    home = [stage.device for stage in plan.stages]
    sent = [
        ref.of(task.microbatch)
        for task in span_of
        for ref in programs[task.stage, task.kind].sends
        if home[task.stage + (1 if task.kind == "F" else -1)] != home[task.stage]
    ]
    assert len(timeline.transfers) == len(sent)
    assert sum(each.num_bytes for each in timeline.transfers) == sum(sizes[name] for name in sent)
    for each in timeline.transfers:
        assert (each.source, each.target) == (home[each.made_by.stage], home[each.reader])
        assert span_of[each.made_by].end_s <= each.start_s <= each.end_s
        assert any(
            task.stage == each.reader and span.start_s >= each.end_s
            for task, span in span_of.items()
        )


@pytest.mark.parametrize("seed", range(NUM_PLANS))
def test_clocks_are_found_as_exactly_as_is_said(seed):
    rng = Random(seed)
    plan, _, _, (rows, _, _) = draw(seed)
    true = run(rng, rows)
    num_processes = rng.randint(1, plan.num_devices)
    processes = [d % num_processes for d in range(plan.num_devices)]
    ahead_s = [0.0, *(rng.uniform(-1e3, 1e3) for _ in processes[1:])]
    seen = [
        replace(
            each,
            start_s=each.start_s + ahead_s[processes[each.device]],
            end_s=each.end_s + ahead_s[processes[each.device]],
        )
        for each in true
    ]
    found, error_s = on_one_clock(rows, processes, seen)
    for each in true:
        got = found[each.device, each.position]
        assert abs(got.start_s - each.start_s) <= error_s + 1e-9
        assert got.end_s - got.start_s == pytest.approx(each.end_s - each.start_s)
