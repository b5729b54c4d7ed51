"""What the planner decides: tasks, the schedule, the plan, and their text forms."""

from jaxptis.plan.csv import schedule_from_csv, schedule_to_csv
from jaxptis.plan.plan import Plan, Recompute, StagePlan
from jaxptis.plan.task import Schedule, Task

__all__ = [
    "Plan",
    "Recompute",
    "Schedule",
    "StagePlan",
    "Task",
    "schedule_from_csv",
    "schedule_to_csv",
]
