"""Everything that touches a jaxpr. Nothing here knows of plans or devices' schedules."""

from passes.add_early import add_early
from passes.drop_dead import drop_dead
from passes.fold_tables import fold_tables
from passes.hoist import hoist
from passes.inline_calls import inline_calls
from passes.peel_scans import peel_scans
from passes.slice_head import slice_head
from passes.split_params import split_params

PROGRAM_PASSES = (
    inline_calls,  # first: calls hide the layers of a jitted model
    peel_scans,  # after it: a loop over layers may stand in a call
    hoist,  # after both: what a remat returns is read in the open now
    drop_dead,  # after all of them: what the caller of an inlined body did not use is now visible
    add_early,  # after it: what is dead is not waited for
    slice_head,  # after drop_dead: it follows all that reads the logits, and nothing dead
    split_params,  # last: every equation that reads a parameter counts
)

STAGE_PASSES = (fold_tables,)
