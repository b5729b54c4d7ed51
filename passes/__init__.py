"""Everything that touches a jaxpr. Nothing here knows of plans or devices' schedules."""

from passes.drop_dead import drop_dead
from passes.inline_calls import inline_calls
from passes.peel_scans import peel_scans
from passes.split_params import split_params

PROGRAM_PASSES = (
    inline_calls,  # first: calls hide the layers of a jitted model
    peel_scans,  # after it: a loop over layers may stand in a call
    drop_dead,  # after both: what a caller of an inlined body did not use is now visible
    split_params,  # last: every equation that reads a parameter counts
)
