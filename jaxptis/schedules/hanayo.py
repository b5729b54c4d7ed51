"""Hanayo: stages placed in waves over the devices."""

from jaxptis.plan import Schedule
from jaxptis.schedules.greedy import Rule, greedy
from jaxptis.schedules.placements import zigzag
from jaxptis.schedules.stage_costs import StageCosts


def hanayo(*, num_devices: int, num_microbatches: int, waves: int) -> Schedule:
    """Make a schedule in the waves of Hanayo (arXiv 2308.15762): 2P stages a wave, there and back.

    The paper gives the placement and the rule, backward first, but no table. This is what the rule
    gives for F = 1 and B = 2. A device keeps at most P microbatches for each of its stages.
    """
    placement = zigzag(num_devices, 2 * waves)
    rule = Rule(
        in_flight=num_devices, num_whole=num_microbatches, alternate=False, limit_ahead=False
    )
    return greedy(placement, StageCosts.even(len(placement)), num_microbatches, rule)
