"""Save a timeline in the form that the suffix of the path names."""

from os import PathLike
from pathlib import Path

from jaxptis.performance.timeline import Timeline
from jaxptis.pictures.figure import save_figure
from jaxptis.pictures.gantt import save_gantt
from jaxptis.pictures.html import save_html
from jaxptis.pictures.trace import save_trace
from jaxptis.plan import Plan

_FORMS = {
    ".html": save_html,
    ".json": save_trace,
    ".png": save_figure,
    ".svg": save_figure,
    ".pdf": save_figure,
    ".txt": save_gantt,
}


def save(
    path: str | PathLike[str],
    timeline: Timeline,
    *,
    measured: Timeline | None = None,
    plan: Plan | None = None,
    title: str = "",
) -> None:
    """Write a picture of a timeline; see `Timeline.save`.

    Raises:
        ValueError: the suffix is not known, the step takes no time, or the timelines and the plan
            are not of one pipeline.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMS:
        raise ValueError(
            f"a timeline cannot be saved as {str(path)!r}; let the path end in one of "
            f"{', '.join(_FORMS)}"
        )
    _FORMS[suffix](path, timeline, measured=measured, plan=plan, title=title)
