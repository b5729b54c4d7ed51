"""Schedules out of a building block: the tasks of one microbatch, repeated at a fixed distance.

From "Pipeline Parallelism with Controllable Memory" (arXiv 2405.15362). There are two stages a
device, there and back, and every task takes one slot, so a device repeats its block every six.
"""

from collections import deque
from dataclasses import dataclass

from jaxptis.plan import Schedule, Task

_PERIOD = 6


@dataclass(frozen=True, kw_only=True)
class Block:
    """The slots of a device's tasks on microbatch 0; weight gradients take the slots between.

    Different modulo six, or two microbatches would meet in a slot.
    """

    forward_there: int
    forward_back: int
    input_grad_back: int
    input_grad_there: int


def repeat(blocks: list[Block], num_microbatches: int) -> Schedule:
    """Return the rows of repeated blocks, one a device: the weight gradients oldest first."""
    last = 2 * len(blocks) - 1
    rows = (
        _with_weight_grads(_slots(block, device, last - device, num_microbatches))
        for device, block in enumerate(blocks)
    )
    return tuple(rows)


def _slots(block: Block, there: int, back: int, num_microbatches: int) -> dict[int, Task]:
    tasks = (
        (block.forward_there, there, "F"),
        (block.forward_back, back, "F"),
        (block.input_grad_back, back, "I"),
        (block.input_grad_there, there, "I"),
    )
    return {
        slot + _PERIOD * microbatch: Task(stage, kind, microbatch)
        for slot, stage, kind in tasks
        for microbatch in range(num_microbatches)
    }


def _with_weight_grads(slots: dict[int, Task]) -> tuple[Task, ...]:
    row: list[Task] = []
    waiting: deque[Task] = deque()
    for slot in range(max(slots) + 1):
        if slot in slots:
            row.append(slots[slot])
            if slots[slot].kind == "I":
                waiting.append(_weight_grad(slots[slot]))
        elif waiting:
            row.append(waiting.popleft())
    return (*row, *waiting)


def _weight_grad(input_grad: Task) -> Task:
    return Task(input_grad.stage, "W", input_grad.microbatch)


def squeeze(schedule: Schedule, max_kept: int) -> Schedule:
    """Reorder rows of F, I and W so that devices wait less, in slots of one task.

    A device whose next F or I has yet to arrive, or has no room, runs a weight gradient; without
    one, the first later F or I of its row that can run, if all before it still fit.

    Args:
        schedule: what `repeat` returned, of peak `max_kept` or less.
        max_kept: stage inputs that a device may keep, from F until W.
    """
    devices = [_Device(row, max_kept) for row in schedule]
    done: set[Task] = set()
    last_stage = max(task.stage for row in schedule for task in row)
    while any(device.has_tasks for device in devices):
        # All devices choose before any is done: what one hands on, the next has a slot later.
        done.update([task for device in devices if (task := device.run(done, last_stage))])
    return tuple(tuple(device.row) for device in devices)


class _Device:
    """What a device has run, and what it has yet to run."""

    def __init__(self, row: tuple[Task, ...], max_kept: int) -> None:
        self.row: list[Task] = []
        self._left = [task for task in row if task.kind != "W"]
        self._weight_grads: deque[Task] = deque()
        self._max_kept = max_kept
        self._kept = 0

    @property
    def has_tasks(self) -> bool:
        return bool(self._left or self._weight_grads)

    def run(self, done: set[Task], last_stage: int) -> Task | None:
        """Run a task, and return it; None where none can run."""
        task = self._pick(done, last_stage)
        if task is None:
            return None
        self.row.append(task)
        match task.kind:
            case "F":
                self._kept += 1
            case "I":
                self._weight_grads.append(_weight_grad(task))
            case "W":
                self._kept -= 1
        return task

    def _pick(self, done: set[Task], last_stage: int) -> Task | None:
        # With its weight gradients run at once, the row in its order would keep this much, and at
        # most `peak` up to a task.
        kept = peak = self._kept - len(self._weight_grads)
        for index, task in enumerate(self._left):
            if _arrived(task, done, last_stage) and (
                task.kind == "I" or max(self._kept, peak) < self._max_kept
            ):
                return self._left.pop(index)
            if self._weight_grads:
                return self._weight_grads.popleft()
            kept += 1 if task.kind == "F" else -1
            peak = max(peak, kept)
        return self._weight_grads.popleft() if self._weight_grads else None


def _arrived(task: Task, done: set[Task], last_stage: int) -> bool:
    stage, microbatch = task.stage, task.microbatch
    if task.kind == "F":
        return stage == 0 or Task(stage - 1, "F", microbatch) in done
    if stage == last_stage:
        return Task(stage, "F", microbatch) in done
    return Task(stage + 1, "I", microbatch) in done
