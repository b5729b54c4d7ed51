"""What the authors of AdaPtis published, for tests."""

from experiments.published import PublishedPlan, published_costs, published_plans

__all__ = ["PublishedPlan", "published_costs", "published_plans"]
