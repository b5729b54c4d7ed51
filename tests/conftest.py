"""Eight CPU devices, strict promotion, and the quick tests first."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Parts of test names: what needs no jax runs first, what trains runs last, the rest between.
FIRST = ("test_imports", "/plan/", "/schedules/", "/performance/", "/optimizer/")
LAST = ("/experiments/", "test_readme")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _any(LAST, item.nodeid) - _any(FIRST, item.nodeid))


def _any(parts, name):
    return any(part in name for part in parts)


@pytest.fixture
def lenient():
    """Standard promotion, for code that nobody here wrote: optax, transformers, tunix."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def compiled_quickly():
    """Leave out most of LLVM's optimizations; XLA's own, and its counts, are the same."""
    before = jax.config.values["jax_disable_most_optimizations"]
    try:
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
