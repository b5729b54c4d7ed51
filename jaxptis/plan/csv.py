"""Schedules as the CSV files that torch.distributed.pipelining reads and writes (compute only).

    0F0,0F1,0B0,,0B1
    1F0,1B0,1F1,1B1

One row a device, one cell a task: `<stage><KIND><microbatch>`. An empty cell is a bubble, and says
nothing: a device starts a task as soon as it can. `(0F3;3B1)OVERLAP_F_B` is a forward and a
backward at one time; here they are two tasks, one after the other.
"""

import csv
import re

from jaxptis.plan.task import Schedule, Task

_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)\s*OVERLAP_F_B")


def schedule_to_csv(schedule: Schedule) -> str:
    """Write a schedule in the form that `schedule_from_csv` reads.

    >>> print(schedule_to_csv(((Task(0, "F", 0), Task(0, "B", 0)),)), end="")
    0F0,0B0
    """
    # A device without tasks has a bubble, because a file's last empty lines are no rows.
    return "".join(",".join(map(str, row or ("", ""))) + "\n" for row in schedule)


def schedule_from_csv(text: str, source: str = "schedule") -> Schedule:
    """Read a schedule; whether it can run, `Plan` checks.

    Args:
        text: the rows.
        source: stands in front of every error: the path of the file, where there is one.

    Raises:
        ValueError: `source: row, cell:` (from 1) what is wrong; or there is no task at all.
    """
    rows = tuple(
        tuple(
            task
            for number, cell in enumerate(cells, start=1)
            for task in _read_cell(cell.strip(), f"{source}: row {row}, cell {number}")
        )
        for row, cells in enumerate(csv.reader(text.rstrip().splitlines()), start=1)
    )
    if not any(rows):
        raise ValueError(f"{source}: no task found; write a row of tasks such as 0F0 per device")
    return rows


def placement_of(schedule: Schedule) -> tuple[int, ...]:
    """Return the device of every stage: the row that its tasks stand in.

    Raises:
        ValueError: a stage stands in two rows, or in none though a later one does.
    """
    device_of: dict[int, int] = {}
    for device, row in enumerate(schedule):
        for task in row:
            home = device_of.setdefault(task.stage, device)
            if home != device:
                raise ValueError(
                    f"stage {task.stage} has tasks on devices {home} and {device}, {task} among "
                    f"them; give all to one device"
                )
    for number, stage in enumerate(sorted(device_of)):
        if stage != number:
            raise ValueError(
                f"the schedule has no task of stage {number}, but of stage {stage}; "
                "number stages from 0 without a gap"
            )
    return tuple(device_of[stage] for stage in range(len(device_of)))


def _read_cell(cell: str, where: str) -> tuple[Task, ...]:
    if not cell:
        return ()
    pair = _PAIR.fullmatch(cell)
    try:
        if pair is None:
            return (Task.parse(cell),)
        return tuple(Task.parse(part.strip()) for part in pair.groups())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
