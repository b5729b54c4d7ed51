"""The registry of schedules: of every family, where its stages are and what its rows are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxptis.plan import Schedule
from jaxptis.schedules.dualpipe_v import dualpipe_v
from jaxptis.schedules.gpipe import gpipe
from jaxptis.schedules.hanayo import hanayo
from jaxptis.schedules.interleaved import interleaved
from jaxptis.schedules.list_schedule import list_schedule
from jaxptis.schedules.one_f_one_b import one_f_one_b
from jaxptis.schedules.placements import loops, zigzag
from jaxptis.schedules.stage_costs import StageCosts
from jaxptis.schedules.v_half import v_half
from jaxptis.schedules.v_min import v_min
from jaxptis.schedules.zb_h1 import zb_h1
from jaxptis.schedules.zb_h2 import zb_h2
from jaxptis.schedules.zb_v import zb_v


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of schedule, for any number of devices and of microbatches that it allows.

    Attributes:
        rows: makes the schedule from `num_devices`, `num_microbatches`, the options, and, where
            `needs_costs`, `costs`.
        placement: gives the device of every stage, from the numbers of devices and of stages of a
            device.
        stages_per_device: how many stages a device has, or per 1 of `stages_option`.
        stages_option: the option that multiplies `stages_per_device`; empty where none does.
        options: whole numbers of 1 or more, and their defaults; None where the family chooses.
        needs_costs: whether the rows depend on what the stages cost.
    """

    rows: Callable[..., Schedule]
    placement: Callable[[int, int], tuple[int, ...]] = loops
    stages_per_device: int = 1
    stages_option: str = ""
    options: Mapping[str, int | None] = field(default_factory=dict)
    needs_costs: bool = False


def _list_rows(
    *,
    num_devices: int,
    num_microbatches: int,
    costs: StageCosts,
    stages_per_device: int,
    in_flight: int | None,
) -> Schedule:
    """Make a list schedule at the memory of 1F1B, if `in_flight` does not say otherwise."""
    return list_schedule(
        zigzag(num_devices, stages_per_device),
        costs,
        num_microbatches,
        in_flight=in_flight or num_devices,
    )


FAMILIES: dict[str, Family] = {
    "gpipe": Family(rows=gpipe),
    "1f1b": Family(rows=one_f_one_b),
    "interleaved": Family(
        rows=interleaved, stages_option="v", options={"v": 2, "group_size": None}
    ),
    "hanayo": Family(
        rows=hanayo,
        placement=zigzag,
        stages_per_device=2,
        stages_option="waves",
        options={"waves": 1},
    ),
    "zb-h1": Family(rows=zb_h1),
    "zb-h2": Family(rows=zb_h2),
    "zb-v": Family(rows=zb_v, placement=zigzag, stages_per_device=2),
    "v-half": Family(rows=v_half, placement=zigzag, stages_per_device=2),
    "v-min": Family(rows=v_min, placement=zigzag, stages_per_device=2),
    "dualpipe-v": Family(rows=dualpipe_v, placement=zigzag, stages_per_device=2),
    "list": Family(
        rows=_list_rows,
        placement=zigzag,
        stages_option="stages_per_device",
        options={"stages_per_device": 1, "in_flight": None},
        needs_costs=True,
    ),
}
