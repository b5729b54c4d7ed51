"""What the planner decides: tasks, the schedule, the plan, and its text form."""

from jaxptis.plan.plan import Plan, StagePlan
from jaxptis.plan.task import Schedule, Task

__all__ = ["Plan", "Schedule", "StagePlan", "Task"]
