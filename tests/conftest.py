"""Eight CPU devices, strict promotion, quick tests first; all is compiled quickly, and once."""

import argparse
import gc
import os
import tempfile

import jax
import pytest

# Leaves out most of LLVM's optimizations; XLA's own, and what it counts, are the same.
LEAVE_OUT = "jax_disable_most_optimizations"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update(LEAVE_OUT, True)
os.environ[LEAVE_OUT.upper()] = "true"  # for programs that tests start: they compile the same

# Parts of test names: what needs no jax runs first, what trains runs last, the rest between.
FIRST = ("test_imports", "/plan/", "/schedules/", "/performance/", "/pictures/", "/optimizer/")
LAST = ("/experiments/", "test_readme")


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: look at 1 case or more")
    return number


def pytest_addoption(parser):
    """Let the plans of as many tiny models as you like be compared with all there are."""
    parser.addoption(
        "--tiny_cases", type=_positive, default=40, help="each is set beside all of its schedules"
    )


def pytest_configure(config):
    """Keep what is compiled for this run: its workers and programs have much in common."""
    if hasattr(config, "workerinput"):
        return  # has it from the environment
    config.compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    settings = {
        "jax_compilation_cache_dir": config.compiled.name,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        config.compiled.cleanup()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _any(LAST, item.nodeid) - _any(FIRST, item.nodeid))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After each file drop what its tests have compiled.

    Each program is several mappings of memory, of which Linux grants a process 65,530: with all
    that a whole run compiles, jaxlib crashes.
    """
    if nextitem is not None and nextitem.path == item.path:
        return
    for value in vars(item.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()


def _any(parts, name):
    return any(part in name for part in parts)


@pytest.fixture
def num_tiny_cases(request):
    """How many models of `tests.optimizer.tiny_cases` to look at."""
    return request.config.getoption("tiny_cases")


@pytest.fixture
def compilations(monkeypatch):
    """A list that grows by one entry a compilation of a lowered program."""
    compiled = []
    original = jax.stages.Lowered.compile

    def count(lowered, *args, **kwargs):
        compiled.append(lowered)
        return original(lowered, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", count)
    return compiled


@pytest.fixture
def lenient():
    """Standard promotion, for code that nobody here wrote: optax, transformers, tunix."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def optimized():
    """Have what runs for longer than it compiles optimized, as users do."""
    jax.config.update(LEAVE_OUT, False)
    yield
    jax.config.update(LEAVE_OUT, True)
