"""Schedules: the fixed ones by name, and a list schedule made for given costs."""

from jaxptis.schedules.families import FAMILIES, Family
from jaxptis.schedules.list_schedule import list_schedule
from jaxptis.schedules.stage_costs import StageCosts
from jaxptis.schedules.strategy import check_fills_stages, names_family, placement, schedule

__all__ = [
    "FAMILIES",
    "Family",
    "StageCosts",
    "check_fills_stages",
    "list_schedule",
    "names_family",
    "placement",
    "schedule",
]
