"""Pictures of timelines: a page for a browser, a trace, a figure for a paper, a chart of text."""

from jaxptis.pictures.bottleneck import Bottleneck, find_bottleneck, say_memory
from jaxptis.pictures.figure import save_figure
from jaxptis.pictures.gantt import gantt
from jaxptis.pictures.html import save_html
from jaxptis.pictures.save import save
from jaxptis.pictures.trace import save_trace

__all__ = [
    "Bottleneck",
    "find_bottleneck",
    "gantt",
    "save",
    "save_figure",
    "save_html",
    "save_trace",
    "say_memory",
]
