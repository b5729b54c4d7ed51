"""The search for a plan."""

from jaxptis.optimizer.adaptis import adaptis
from jaxptis.optimizer.balance import balance, uniform
from jaxptis.optimizer.best import best_plan
from jaxptis.optimizer.mist import mist
from jaxptis.optimizer.reorder import reorder

__all__ = ["adaptis", "balance", "best_plan", "mist", "reorder", "uniform"]
