"""From a plan and its predicted timeline to the instruction lists of the devices.

A transfer blocks both devices until both are there; `performance.transfers` says where it stands.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxptis.executor.instructions import Rows
from jaxptis.executor.tasks import TaskPrograms
from jaxptis.performance import Span, Timeline
from jaxptis.performance.transfers import Places, in_sequence
from jaxptis.plan import Plan


@dataclass(frozen=True)
class _Transfer:
    source: int
    target: int
    buffer: str


def emit_tasks(rows: Rows, plan: Plan, timeline: Timeline, programs: TaskPrograms) -> None:
    """Append the tasks of the plan and the transfers between them."""
    sequence = in_sequence(plan, timeline.spans)
    places = Places(sequence)
    due = defaultdict(list)
    for transfer, made, read in _transfers(plan, [span for _, span in sequence], programs):
        due[places.best(transfer.source, transfer.target, made, read)].append(transfer)
    for position, (device, span) in enumerate(sequence):
        for each in due[position]:
            rows.transfer(each.source, each.target, each.buffer)
        task = span.task
        program = programs.get((task.stage, task.kind))
        if program is not None:
            reads = [ref.of(task.microbatch) for ref in program.reads]
            writes = [ref.of(task.microbatch) for ref in program.writes]
            rows.run(device, program.name, reads, writes, task)


def _transfers(
    plan: Plan, spans: Sequence[Span], programs: TaskPrograms
) -> Iterator[tuple[_Transfer, int, int]]:
    """Yield each transfer, and where the tasks stand that make its buffer and first read it."""
    home = [stage.device for stage in plan.stages]
    wanted: dict[tuple[int, str], int] = {}  # target and buffer -> where it was made
    for position, span in enumerate(spans):
        task = span.task
        program = programs.get((task.stage, task.kind))
        if program is None:
            continue
        for ref in program.reads:
            key = home[task.stage], ref.of(task.microbatch)
            if key in wanted:
                made = wanted.pop(key)
                source = home[spans[made].task.stage]
                yield _Transfer(source, key[0], key[1]), made, position
        for ref, stage in program.sends:
            if home[stage] != home[task.stage]:
                wanted[home[stage], ref.of(task.microbatch)] = position
    assert not wanted, wanted
