"""From a plan and its predicted timeline to the instruction lists of the devices.

A transfer blocks both devices until both are there, so where it stands decides how long they wait.
It is put where, by the timeline, it delays them least. Both lists get it at the same moment of one
sequence of all instructions: so they never wait for each other in a circle.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxptis.executor.instructions import Rows
from jaxptis.executor.tasks import TaskPrograms
from jaxptis.performance import Span, Timeline
from jaxptis.plan import Plan
from jaxptis.plan.order import execution_order


@dataclass(frozen=True)
class _Transfer:
    source: int
    target: int
    buffer: str


def emit_tasks(rows: Rows, plan: Plan, timeline: Timeline, programs: TaskPrograms) -> None:
    """Append the tasks of the plan and the transfers between them."""
    order = {task: i for i, task in enumerate(execution_order(plan.schedule))}
    every = [(device, span) for device, row in enumerate(timeline.spans) for span in row]
    every.sort(key=lambda each: (each[1].start_s, order[each[1].task]))
    places = _Places([device for device, _ in every], [span for _, span in every])
    due = defaultdict(list)
    for transfer, made, read in _transfers(plan, [span for _, span in every], programs):
        due[places.best(transfer, made, read)].append(transfer)
    for position, (device, span) in enumerate(every):
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


class _Places:
    """Where, in the sequence of all tasks, a transfer delays its two devices least."""

    def __init__(self, devices: Sequence[int], spans: Sequence[Span]) -> None:
        self._positions: defaultdict[int, list[int]] = defaultdict(list)
        for position, device in enumerate(devices):
            self._positions[device].append(position)
        self._spans = spans

    def best(self, transfer: _Transfer, made: int, read: int) -> int:
        """Return the position, after `made` and up to `read`, before which the transfer stands."""
        ends = transfer.source, transfer.target
        candidates = sorted(
            {made + 1, read}.union(
                position + 1
                for device in ends
                for position in self._between(device, made + 1, read)
            )
        )
        return min(candidates, key=lambda position: self._delay_s(ends, position))

    def _between(self, device: int, start: int, stop: int) -> list[int]:
        positions = self._positions[device]
        return positions[bisect_left(positions, start) : bisect_left(positions, stop)]

    def _delay_s(self, ends: Sequence[int], position: int) -> float:
        """Return by how much a transfer before this task holds up the next tasks of its ends."""
        around = []
        for device in ends:
            positions = self._positions[device]
            following = bisect_left(positions, position)
            last = self._spans[positions[following - 1]].end_s if following else 0.0
            more = following < len(positions)
            around.append((last, self._spans[positions[following]].start_s if more else None))
        ready_s = max(last for last, _ in around)
        return sum(max(0.0, ready_s - start) for _, start in around if start is not None)
