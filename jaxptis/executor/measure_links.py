"""What connects the devices of a pipeline, from running transfers between them."""

import json
import statistics
import time

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
    are measured, one link after the other, there and back; any other is taken to be like the
    slowest of these. Every process must call this, with the same arguments, and gets the same.

    Args:
        cluster: of which the devices are kept.
        compiler: for these devices.
    """
    count = len(compiler.devices)
    pairs = [(d, (d + 1) % count) for d in range(count) if count > 1]
    compiler.processes.begin("measuring the links")
    own: dict[str, list[float]] = {}
    for pair in dict.fromkeys(map(_sorted, pairs)):
        routes = [(_route(pair, n), _route(pair[::-1], n)) for n in _SIZES]
        local = any(map(compiler.is_local, pair))
        exchanges = compiler.exchanges([each for both in routes for each in both]) if local else {}
        compiler.processes.wait_for_all()  # for them to be compiled, and for the links in use
        if local:
            found = [
                _transfer_s(compiler, there, exchanges[there], exchanges[back])
                for there, back in routes
            ]
            if compiler.is_local(pair[0]):
                own[str(pair)] = found
    every: dict[str, list[float]] = {}
    for text in compiler.processes.share(json.dumps(own)):
        every |= json.loads(text)
    links = {
        pair: _fit(*every[str(_sorted(pair))]) for both in pairs for pair in (both, both[::-1])
    }
    slowest = max(links.values(), key=lambda link: link.transfer_s(_SIZES[-1]), default=Link())
    return Cluster(cluster.devices, slowest, links)


def _sorted(pair: tuple[int, int]) -> tuple[int, int]:
    return min(pair), max(pair)


def _route(pair: tuple[int, int], num_bytes: int) -> Route:
    return Route(pair, ((Aval((num_bytes,), jnp.uint8),), ()))


def _transfer_s(compiler: Compiler, route: Route, there: Exchange, back: Exchange) -> float:
    """Return half the median seconds of a way there and back, as the first end sees it.

    The first end works in between, as in a step, while the other waits.
    """
    source, _ = route.devices
    is_local = compiler.is_local(source)
    device = compiler.devices[source]
    sent, work = [], []
    if is_local:
        (aval,), _ = route.sends
        sent = [jax.device_put(jnp.zeros(aval.shape, aval.dtype), device)]
        work = [jax.device_put(jnp.zeros(_WORK_BYTES // 4), device)]
    do = jax.jit(lambda x: x + 1, donate_argnums=0)
    runs_s = []
    for _ in range(NUM_WARM_UPS + NUM_RUNS):
        work = jax.block_until_ready([do(x) for x in work])
        start_s = time.perf_counter()
        arrived = jax.block_until_ready(there(*sent))
        jax.block_until_ready(back(*arrived))
        runs_s.append((time.perf_counter() - start_s) / 2)
    return statistics.median(runs_s[NUM_WARM_UPS:])


def _fit(small_s: float, large_s: float) -> Link:
    """Return the link on which transfers of the two sizes take as long as that."""
    small, large = _SIZES
    if large_s <= small_s:
        return Link(latency_s=small_s)
    bytes_per_s = (large - small) / (large_s - small_s)
    return Link(latency_s=max(0.0, small_s - small / bytes_per_s), bytes_per_s=bytes_per_s)
