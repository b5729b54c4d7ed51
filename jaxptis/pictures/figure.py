"""A timeline as a figure for a paper, by matplotlib."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jaxptis.performance.timeline import Span, Timeline
from jaxptis.pictures.colors import KIND_COLORS, KIND_WORDS, ink, shade
from jaxptis.pictures.facts import device_facts
from jaxptis.pictures.together import named
from jaxptis.pictures.words import percent
from jaxptis.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN = 7.0  # the text of a page in two columns
_AXES_PT = 400  # about what of it the rows have
_ROW_IN = 0.2
_FONT_PT = 7
_NUMBER_PT = 5
_DIGIT_PT = 3.75  # as wide as a digit of that height, and a little more
# More boxes than this become pixels inside of the PDF or SVG: readers of them grow slow.
_MOST_VECTOR_BOXES = 20_000
_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def save_figure(
    path: str | PathLike[str],
    timeline: Timeline,
    *,
    measured: Timeline | None = None,
    plan: Plan | None = None,
    title: str = "",
) -> None:
    """Draw a row for each device, with its bubble beside it, in the form that the suffix names.

    Args:
        path: ends in .png, .svg or .pdf.
        timeline: the predicted one, or any.
        measured: what really ran; its rows stand below, to the same scale.
        plan: says how many layers each device has.
        title: stands above.

    Raises:
        ValueError: matplotlib is missing, the step takes no time, or the timelines and the plan
            are not of one pipeline.
    """
    given = named(timeline, measured, plan)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "figures are drawn by matplotlib, which is missing; pip install 'jaxptis[pictures]'"
        ) from error
    step_s = max(each.step_s for each in given.values())
    num_boxes = sum(len(row) for each in given.values() for row in each.spans)
    height_in = 0.55 + len(given) * (0.25 + _ROW_IN * len(timeline.spans)) + 0.2 * bool(title)
    settings = {
        "font.size": _FONT_PT,
        # Text stays text, which a journal asks for and a reader can search.
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "text.parse_math": False,  # names may have dollars in them
    }
    with matplotlib.rc_context(cast(Any, settings)):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        if title:
            figure.suptitle(title)
        for place, (name, one) in enumerate(given.items(), start=1):
            axes = figure.add_subplot(len(given), 1, place)
            axes.set_title(name, loc="left", fontsize=_FONT_PT)
            _draw(axes, one, step_s, plan, are_pixels=num_boxes > _MOST_VECTOR_BOXES)
        _draw_legend(figure, given.values())
        figure.savefig(path, dpi=300)


class _Box(NamedTuple):
    left: float  # in the unit of the axis, as is the width
    width: float
    color: str
    number: str


def _draw(
    axes: "Axes", timeline: Timeline, step_s: float, plan: Plan | None, *, are_pixels: bool
) -> None:
    unit, unit_s = next((each for each in _UNITS if step_s >= each[1]), _UNITS[-1])
    facts = device_facts(timeline)
    point = step_s / unit_s / _AXES_PT  # the width of one, in the unit of the axis
    for device, row in enumerate(timeline.spans):
        boxes = _boxes(row, facts[device].stages, unit_s)
        _draw_boxes(axes, device, boxes, point, are_pixels=are_pixels)
        _draw_numbers(axes, device, boxes, point)
        _write_beside(axes, device, percent(1 - facts[device].share))
    _write_beside(axes, -1, "bubble")
    axes.set_xlim(0, step_s / unit_s)
    axes.set_ylim(len(facts) - 0.4, -0.6)
    labels = [_label(device, each.stages, plan) for device, each in enumerate(facts)]
    axes.set_yticks(range(len(facts)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(unit, loc="right", labelpad=0)


def _boxes(row: Sequence[Span], stages: Sequence[int], unit_s: float) -> list[_Box]:
    return [
        _Box(
            left=start_s / unit_s,
            width=(end_s - start_s) / unit_s,
            color=shade(task.kind, stages.index(task.stage), len(stages)),
            number=str(task.microbatch),
        )
        for task, start_s, end_s in row
    ]


def _draw_boxes(
    axes: "Axes", device: int, boxes: Sequence[_Box], point: float, *, are_pixels: bool
) -> None:
    ranges: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for box in boxes:
        ranges[box.color].append((box.left, box.width))
    are_wide = all(box.width > 2 * point for box in boxes)
    for color, of_color in ranges.items():
        axes.broken_barh(
            of_color,
            (device - 0.4, 0.8),
            facecolors=color,
            edgecolors="white",
            linewidth=0.4 if are_wide else 0,
            rasterized=are_pixels,
        )


def _draw_numbers(axes: "Axes", device: int, boxes: Sequence[_Box], point: float) -> None:
    """Write the microbatch in each box that has room for it."""
    for box in boxes:
        if box.width > len(box.number) * _DIGIT_PT * point:
            axes.text(
                box.left + box.width / 2,
                device,
                box.number,
                color=ink(box.color),
                fontsize=_NUMBER_PT,
                ha="center",
                va="center_baseline",
            )


def _write_beside(axes: "Axes", device: int, words: str) -> None:
    """Write to the right of a device's row."""
    axes.text(1.01, device, words, transform=axes.get_yaxis_transform(), va="center")


def _label(device: int, stages: Sequence[int], plan: Plan | None) -> str:
    if plan is None:
        return f"device {device}"
    num_layers = sum(len(plan.stages[stage].layers) for stage in stages)
    return f"device {device}: {num_layers} layer{'s' if num_layers != 1 else ''}"


def _draw_legend(figure: "Figure", given: Iterable[Timeline]) -> None:
    from matplotlib.patches import Patch

    rows = [row for one in given for row in one.spans]
    kinds = {span.task.kind for row in rows for span in row}
    patches = [
        Patch(color=color, label=f"{kind} {KIND_WORDS[kind]}")
        for kind, color in KIND_COLORS.items()
        if kind in kinds
    ]
    if any(len({span.task.stage for span in row}) > 1 for row in rows):
        patches.append(Patch(alpha=0, label="lighter: a later stage of the device"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
