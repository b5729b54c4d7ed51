"""What a device can do, by three micro-benchmarks, where no data sheet is at hand."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxptis.cluster import DeviceSpec, kind_of

NUM_RUNS = 5
LONG_ENOUGH_S = 0.01
"""Of a matmul, for what it takes to start one to be little beside it."""

_WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
_ARRAY_BYTES = 2**28  # more than any cache
_NUM_INPUTS, _NUM_OUTPUTS = 8, 5  # of half the programs of the layers of LLaMA-2, no more


def calibrate(device: Any, dtype: DTypeLike = jnp.bfloat16) -> DeviceSpec:
    """Measure the rates of a device: of a matmul in `dtype`, and of a copy, the best of several.

    And how long it takes to start a program with as many arrays as those of layers have, likewise.

    Args:
        device: one of `jax.local_devices()`.
        dtype: of the matmul.
    """
    stats = device.memory_stats() or {}
    return DeviceSpec(
        kind=kind_of(device),
        flops_per_s=_flops_per_s(device, dtype),
        bytes_per_s=_bytes_per_s(device),
        memory_bytes=stats.get("bytes_limit"),
        start_s=_start_s(device),
    )


def _flops_per_s(device: Any, dtype: DTypeLike) -> float:
    best = 0.0
    for width in _WIDTHS:
        seconds = _matmul_s(jax.device_put(jnp.ones((width, width), dtype), device))
        best = max(best, 2 * width**3 / seconds)
        if seconds > LONG_ENOUGH_S:
            break
    return best


def _matmul_s(x: jax.Array) -> float:
    square = jax.jit(lambda x: x @ x)
    return _best_s(lambda: square(x).block_until_ready())


def _bytes_per_s(device: Any) -> float:
    """Measure reading and writing an array in place: new memory would have to be found first."""
    x = jax.device_put(jnp.zeros(_ARRAY_BYTES // 4, jnp.float32), device)
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> None:
        nonlocal x
        x = in_place(x)
        x.block_until_ready()

    return 2 * x.nbytes / _best_s(run)


def _start_s(device: Any) -> float:
    run = empty_program(_NUM_INPUTS, _NUM_OUTPUTS, device)
    return _best_s(lambda: jax.block_until_ready(run()))


def empty_program(num_inputs: int, num_outputs: int, device: Any) -> Callable[[], list[jax.Array]]:
    """Return a program that does next to nothing with so many arrays, and its arguments."""
    zeros = [jax.device_put(np.float32(0), device)] * num_inputs
    empty = jax.jit(lambda *args: [args[0] + k for k in range(num_outputs)])
    return functools.partial(empty.lower(*zeros).compile(), *zeros)


def _best_s(run: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of several runs, after one to warm up."""
    run()
    runs_s = []
    for _ in range(NUM_RUNS):
        start_s = time.perf_counter()
        run()
        runs_s.append(time.perf_counter() - start_s)
    return min(runs_s)
