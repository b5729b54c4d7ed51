"""Random valid plans, for tests of everything that takes a plan."""

from hypothesis import strategies as st

from experiments.random_plan import random_plan
from jaxptis.plan import Plan


def plans(*, split: bool = True) -> st.SearchStrategy[Plan]:
    """Return the hypothesis strategy of `random_plan`."""
    return st.randoms(use_true_random=False).map(lambda rng: random_plan(rng, split=split))
