"""The search for a plan."""

from jaxptis.optimizer.balance import balance

__all__ = ["balance"]
