"""The search for a plan."""

from jaxptis.optimizer.balance import balance
from jaxptis.optimizer.best import best_plan

__all__ = ["balance", "best_plan"]
