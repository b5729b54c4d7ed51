"""Everything that touches a jaxpr. Nothing here knows of plans or devices' schedules."""

from passes.drop_dead import drop_dead
from passes.hoist import hoist
from passes.inline_calls import inline_calls
from passes.slice_head import slice_head

PROGRAM_PASSES = (
    inline_calls,  # first: calls hide the layers of a jitted model
    hoist,  # after it: what a remat returns is read in the open now
    drop_dead,  # after both: what a caller of an inlined body did not use is now visible
    slice_head,  # last: it follows all that reads the logits, through calls, and nothing dead
)
