"""What connects the devices of a pipeline, from running transfers between them."""

import json
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxptis.cluster import Cluster, Link
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.programs import Aval
from jaxptis.executor.transfer import Exchange, Route

NUM_WARM_UPS, NUM_RUNS = 5, 25
_SIZES = (2**12, 2**22)  # bytes
_WORK_BYTES = 2**24


def measure_links(cluster: Cluster, compiler: Compiler) -> Cluster:
    """Return the cluster with the links that are found between its devices.

    A transfer is a program of both its devices, as in a step. Neighbours in the ring of the devices
    are measured, one link after the other; any other is taken to be like the slowest of these.
    Every process must call this, with the same arguments, and gets the same.

    Args:
        cluster: of which the devices are kept.
        compiler: for these devices.
    """
    count = len(compiler.devices)
    ring = [(d, (d + 1) % count) for d in range(count) if count > 1]
    pairs = dict.fromkeys(pair for ends in ring for pair in (ends, ends[::-1]))
    compiler.processes.begin("measuring the links")
    own: dict[str, list[list[float]]] = {}
    for pair in pairs:
        routes = [_route(pair, num_bytes) for num_bytes in _SIZES]
        local = any(map(compiler.is_local, pair))
        exchanges = compiler.exchanges(routes) if local else {}
        compiler.processes.wait_for_all()  # for them to be compiled, and for the links in use
        if local:
            own[str(pair)] = [_runs_s(compiler, route, exchanges[route]) for route in routes]
    every = [json.loads(text) for text in compiler.processes.share(json.dumps(own))]
    links = {
        pair: _fit(*_medians_s([found[str(pair)] for found in every if str(pair) in found]))
        for pair in pairs
    }
    slowest = max(links.values(), key=lambda link: link.transfer_s(_SIZES[-1]), default=Link())
    return Cluster(cluster.devices, slowest, links)


def _route(pair: tuple[int, int], num_bytes: int) -> Route:
    return Route(pair, ((Aval((num_bytes,), jnp.uint8),), ()))


def _runs_s(compiler: Compiler, route: Route, exchange: Exchange) -> list[float]:
    """Return the seconds of each transfer, as the ends in this process see them.

    Both ends work in between, as in a step: one that only waits is woken up sooner.
    """
    devices = [compiler.devices[d] for d in route.devices if compiler.is_local(d)]
    work = jax.jit(lambda x: x + 1, donate_argnums=0)
    busy = [jax.device_put(jnp.zeros(_WORK_BYTES // 4), device) for device in devices]
    source, _ = route.devices
    sent = [
        jax.device_put(jnp.zeros(aval.shape, aval.dtype), compiler.devices[source])
        for aval in route.sends[0]
        if compiler.is_local(source)
    ]
    runs_s = []
    for _ in range(NUM_WARM_UPS + NUM_RUNS):
        busy = jax.block_until_ready([work(x) for x in busy])
        start_s = time.perf_counter()
        jax.block_until_ready(exchange(*sent))
        runs_s.append(time.perf_counter() - start_s)
    return runs_s[NUM_WARM_UPS:]


def _medians_s(ends: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Return the median of each size: of what the end saw that was the last to be ready."""
    by_size = zip(*ends, strict=True)
    return [statistics.median(map(min, zip(*runs_s, strict=True))) for runs_s in by_size]


def _fit(small_s: float, large_s: float) -> Link:
    """Return the link on which transfers of the two sizes take as long as that."""
    small, large = _SIZES
    if large_s <= small_s:
        return Link(latency_s=small_s)
    bytes_per_s = (large - small) / (large_s - small_s)
    return Link(latency_s=max(0.0, small_s - small / bytes_per_s), bytes_per_s=bytes_per_s)
