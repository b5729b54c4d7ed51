"""Which task needs which, and an order of all tasks that respects it and every device's row."""

from collections import defaultdict
from collections.abc import Container

from jaxptis.plan.task import Schedule, Task


def needs(task: Task, tasks: Container[Task]) -> tuple[Task, ...]:
    """Return the tasks out of `tasks` whose results `task` reads.

    Stages form a chain: what skips some of them is handed on through them.
    """
    stage, microbatch = task.stage, task.microbatch
    read: tuple[Task, ...]
    match task.kind:
        case "F":
            read = (Task(stage - 1, "F", microbatch),) if stage else ()
        case "W":
            read = (Task(stage, "I", microbatch),)
        case _:
            read = (
                Task(stage, "F", microbatch),
                Task(stage + 1, "B", microbatch),
                Task(stage + 1, "I", microbatch),
            )
    return tuple(each for each in read if each in tasks)


def execution_order(schedule: Schedule) -> tuple[Task, ...]:
    """Return all tasks, each after those it needs and those before it in its row.

    Takes time linear in the number of tasks. No task may stand in `schedule` twice.

    Raises:
        ValueError: the rows wait for each other in a circle; the message names it.
    """
    tasks = frozenset(task for row in schedule for task in row)
    done: dict[Task, None] = {}
    position = [0] * len(schedule)
    waiting: defaultdict[Task, list[int]] = defaultdict(list)
    runnable = list(range(len(schedule)))
    while runnable:
        device = runnable.pop()
        if position[device] == len(schedule[device]):
            continue
        task = schedule[device][position[device]]
        missing = _first_missing(task, tasks, done)
        if missing is None:
            done[task] = None
            position[device] += 1
            runnable += [*waiting.pop(task, ()), device]
        else:
            waiting[missing].append(device)
    if len(done) < len(tasks):
        raise ValueError(_deadlock(schedule, tasks, done))
    return tuple(done)


def _first_missing(task: Task, tasks: Container[Task], done: Container[Task]) -> Task | None:
    return next((need for need in needs(task, tasks) if need not in done), None)


def _deadlock(schedule: Schedule, tasks: Container[Task], done: Container[Task]) -> str:
    """Name the circle: who stands at which task and waits for which."""
    device_of = {task: device for device, row in enumerate(schedule) for task in row}
    waits: dict[int, tuple[Task, Task]] = {}
    device = next(device for task, device in device_of.items() if task not in done)
    while device not in waits:
        task = next(task for task in schedule[device] if task not in done)
        missing = _first_missing(task, tasks, done)
        assert missing is not None, f"{task} of device {device} could run"
        waits[device] = task, missing
        device = device_of[missing]
    circle = list(waits)[list(waits).index(device) :]
    if len(circle) == 1:
        task, missing = waits[device]
        return f"device {device} runs {task} before {missing}, which it needs; move {missing} up"
    steps = (f"device {each} waits at {waits[each][0]} for {waits[each][1]}" for each in circle)
    return f"deadlock: {'; '.join(steps)}; move one of the awaited tasks to an earlier place"
