"""What a plan costs: seconds of layers, and the timeline of a step."""

from jaxptis.performance.bubbles import Bubble
from jaxptis.performance.check_memory import check_memory
from jaxptis.performance.costs import Costs, LayerCost, TiedParams, roofline_s
from jaxptis.performance.memory import MemoryCurve
from jaxptis.performance.simulate import simulate
from jaxptis.performance.spans import Span, TransferSpan
from jaxptis.performance.timeline import Timeline

__all__ = [
    "Bubble",
    "Costs",
    "LayerCost",
    "MemoryCurve",
    "Span",
    "TiedParams",
    "Timeline",
    "TransferSpan",
    "check_memory",
    "roofline_s",
    "simulate",
]
