"""The search for a plan.

Of `papers`, `search`, `certificate`, `partition` and `steps` each may import those after it.
"""

from jaxptis.optimizer.papers.adaptis import adaptis
from jaxptis.optimizer.papers.mist import mist
from jaxptis.optimizer.partition.balance import balance, check_fills_devices, uniform
from jaxptis.optimizer.search.best import best_plan
from jaxptis.optimizer.search.reorder import reorder

__all__ = [
    "adaptis",
    "balance",
    "best_plan",
    "check_fills_devices",
    "mist",
    "reorder",
    "uniform",
]
