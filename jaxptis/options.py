"""What a user chooses."""

import dataclasses
from os import PathLike
from typing import Any

from jaxptis.cluster import Cluster
from jaxptis.performance import Costs
from jaxptis.plan import Plan

Strategy = str | PathLike[str] | Plan
CostsSource = str | PathLike[str] | Costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user chooses; see `jaxptis.pipeline`."""

    num_microbatches: int
    devices: tuple[Any, ...]
    strategy: Strategy
    batch_axes: Any
    has_aux: bool
    cluster: Cluster
    dump_to: str | None
    head_slices: tuple[int, ...] = (1,)
    costs: CostsSource = "estimated"
