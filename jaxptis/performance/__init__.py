"""What a plan costs: seconds of layers, and the timeline of a step."""

from jaxptis.performance.costs import Costs, LayerCost, TiedParams, roofline_s
from jaxptis.performance.simulate import simulate
from jaxptis.performance.timeline import Span, Timeline

__all__ = ["Costs", "LayerCost", "Span", "TiedParams", "Timeline", "roofline_s", "simulate"]
