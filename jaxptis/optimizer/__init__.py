"""The search for a plan."""

from jaxptis.optimizer.balance import balance
from jaxptis.optimizer.best import best_plan
from jaxptis.optimizer.reorder import reorder

__all__ = ["balance", "best_plan", "reorder"]
