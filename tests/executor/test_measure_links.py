"""Links from the seconds of transfers; what the clock says is given."""

import itertools

import jax
import pytest

from jaxptis.cluster import Cluster, Link
from jaxptis.executor import measure_links as measuring
from jaxptis.executor.compiled import Compiler


@pytest.mark.parametrize(
    ("num_devices", "pairs"),
    [
        (1, []),
        (2, [(0, 1), (1, 0)]),
        (3, [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)]),
    ],
)
def test_links_of_neighbours_in_the_ring(num_devices, pairs):
    devices = jax.devices()[:num_devices]
    cluster = measuring.measure_links(Cluster.of(devices), Compiler(devices))
    assert [*cluster.links] == pairs
    assert cluster.devices == Cluster.of(devices).devices
    assert all(0 < link.transfer_s(2**12) < 1 for link in cluster.links.values())


def test_any_other_link_is_like_the_slowest(monkeypatch):
    fits = itertools.count(1)
    monkeypatch.setattr(measuring, "NUM_RUNS", 1)
    monkeypatch.setattr(measuring, "_fit", lambda *_: Link(latency_s=next(fits) % 7))
    devices = jax.devices()[:4]
    cluster = measuring.measure_links(Cluster.of(devices), Compiler(devices))
    assert [link.latency_s for link in cluster.links.values()] == [1, 2, 3, 4, 5, 6, 0, 1]
    assert cluster.link_between(0, 2) == cluster.link_between(1, 3) == Link(latency_s=6)


@pytest.mark.parametrize(
    "link",
    [
        Link(latency_s=1e-3, bytes_per_s=1e9),
        Link(latency_s=0.0, bytes_per_s=1e6),
        Link(latency_s=2),
    ],
)
def test_latency_and_rate_are_found_in_two_sizes(link):
    fit = measuring._fit(*map(link.transfer_s, measuring._SIZES))
    assert fit.latency_s == pytest.approx(link.latency_s, abs=1e-9)
    assert fit.bytes_per_s == pytest.approx(link.bytes_per_s)


def test_a_transfer_is_half_the_way_there_and_back(monkeypatch):
    """What is sent back is what has arrived; the work in between takes no part."""
    now_s, seen = 0.0, []

    def passing(name, seconds):
        def exchange(x):
            nonlocal now_s
            now_s += next(seconds)
            seen.append((name, x.shape))
            return [x]

        return exchange

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now_s)
    compiler = Compiler(jax.devices()[:2])
    there, back = (
        passing(name, itertools.cycle(seconds))
        for name, seconds in (("there", (1, 2, 9)), ("back", (3, 4, 5)))
    )
    route = measuring._route((0, 1), 8)
    assert measuring._transfer_s(compiler, route, there, back) == 3
    assert seen[:2] == [("there", (8,)), ("back", (8,))]
