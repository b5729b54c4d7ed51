"""A timeline as a chart of characters, for a terminal."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from rich.text import Text

from jaxptis.performance.timeline import Span, Timeline
from jaxptis.pictures.bottleneck import find_bottleneck, say_memory
from jaxptis.pictures.colors import KIND_COLORS, KIND_WORDS, ink
from jaxptis.pictures.together import named
from jaxptis.pictures.words import duration, percent
from jaxptis.plan import Plan

_IDLE = "·"
_LEAST_CELLS = 10
_FILE_WIDTH = 100


def gantt(timeline: Timeline, *, measured: Timeline | None = None, width: int = 80) -> Text:
    """Draw a line a device: what it does in the time of each character, and its bubble.

    `rich.print(gantt(timeline))` has colours, `print(gantt(timeline))` has not.

    Args:
        timeline: the predicted one, or any.
        measured: what really ran; its lines stand under the predicted ones, to the same scale.
        width: characters in a line.

    Raises:
        ValueError: the width leaves no room, the step takes no time, or the timelines have
            different devices.
    """
    given = named(timeline, measured)
    step_s = max(one.step_s for one in given.values())
    num_digits = len(str(len(timeline.spans) - 1))
    name_width = 1 if measured is None else len(" predicted ")
    num_cells = width - len("device ") - num_digits - name_width - len(" bubble 100 %")
    if num_cells < _LEAST_CELLS:
        least = width - num_cells + _LEAST_CELLS
        raise ValueError(f"width is {width}, which has no room for a chart; use {least} or more")
    chart = Text(no_wrap=True)
    for device in range(len(timeline.spans)):
        for index, (name, one) in enumerate(given.items()):
            head = " " * (7 + num_digits) if index else f"device {device:>{num_digits}}"
            chart.append(f"{head}{f'{name} ':>{name_width}}")
            for kind in cells(one.spans[device], step_s, num_cells):
                chart.append(kind, _style(kind))
            chart.append(f" bubble {percent(one.bubble[device]):>5}\n")
    return chart.append_text(_foot(given))


def save_gantt(
    path: str | PathLike[str],
    timeline: Timeline,
    *,
    measured: Timeline | None = None,
    plan: Plan | None = None,
    title: str = "",
) -> None:
    """Write `gantt` without colours, and what there is to say of bottleneck and memory.

    Args:
        path: of the file.
        timeline: the predicted one, or any.
        measured: what really ran.
        plan: names the layers.
        title: stands above.

    Raises:
        ValueError: the step takes no time, or the timelines and the plan are not of one pipeline.
    """
    lines = [title, ""] if title else []
    lines.append(str(gantt(timeline, measured=measured, width=_FILE_WIDTH)))
    for name, one in named(timeline, measured, plan).items():
        said = find_bottleneck(one, plan).sentence, say_memory(one)
        lines += [f"{name}: {each}" if name else each for each in said if each]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells(row: Sequence[Span], step_s: float, num_cells: int) -> str:
    """Return for every equal part of the step a kind that takes much of it, or idle.

    What a part leaves out counts in the next, so that kinds have their shares of the line.
    """
    cell_s = step_s / num_cells
    taken: list[dict[str, float]] = [{} for _ in range(num_cells)]
    for task, start_s, end_s in row:
        for index in range(int(start_s / cell_s), min(num_cells, int(end_s / cell_s) + 1)):
            inside_s = min(end_s, (index + 1) * cell_s) - max(start_s, index * cell_s)
            taken[index][task.kind] = taken[index].get(task.kind, 0.0) + inside_s
    shown = ""
    left_out_s: defaultdict[str, float] = defaultdict(float)
    for each in taken:
        each[_IDLE] = cell_s - sum(each.values())
        for kind, seconds in each.items():
            left_out_s[kind] += seconds
        present = [kind for kind, seconds in each.items() if seconds > 0]
        shown += max(present, key=left_out_s.__getitem__)
        left_out_s[shown[-1]] -= cell_s
    return shown


def _style(kind: str) -> str:
    color = KIND_COLORS.get(kind)
    return f"{ink(color)} on {color}" if color else ""


def _foot(given: Mapping[str, Timeline]) -> Text:
    steps = (f"step {duration(one.step_s)} {name}".rstrip() for name, one in given.items())
    foot = Text(f"{', '.join(steps)}; ")
    kinds = {span.task.kind for one in given.values() for row in one.spans for span in row}
    for kind in (each for each in KIND_COLORS if each in kinds):
        foot.append(kind, _style(kind))
        foot.append(f" {KIND_WORDS[kind]}, ")
    return foot.append(f"{_IDLE} idle\n")
