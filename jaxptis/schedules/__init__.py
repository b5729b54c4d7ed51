"""Schedules: the fixed ones by name, and a list schedule made for given costs."""

from jaxptis.schedules.families import FAMILIES, Family
from jaxptis.schedules.list_schedule import list_schedule
from jaxptis.schedules.stage_costs import StageCosts
from jaxptis.schedules.strategy import (
    PARTITIONS,
    check_fills_stages,
    names_family,
    partition,
    placement,
    schedule,
)

__all__ = [
    "FAMILIES",
    "PARTITIONS",
    "Family",
    "StageCosts",
    "check_fills_stages",
    "list_schedule",
    "names_family",
    "partition",
    "placement",
    "schedule",
]
