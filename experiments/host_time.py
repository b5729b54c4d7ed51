"""What the executor's loop costs the host, operation by operation, with maths that costs nothing.

Two clocks tell the host's work from its waits. Of single operations, begun when their inputs are
ready, both are read: on a wall clock a transfer is long because its call returns only when threads
of both devices have met; the clock of the calling thread stands still while it sleeps. The whole
step, where calls also wait for their inputs (on jax 0.10.2), is timed by both, unchanged.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxptis
from jaxptis.executor.executable import Executable
from jaxptis.executor.instructions import Run
from jaxptis.executor.prove import in_one_order

KINDS = ("task", "transfer", "other")  # other: zeros, the mean of the loss
WIDTH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationTime:
    """Host time of one operation of a kind, in microseconds: the mean over all of a step.

    Attributes:
      call_us: from its call until it returns, its inputs being ready; a wall clock.
      call_thread_us: of this, what the calling thread works.
      loop_us: around its call: to find its inputs, keep its results, drop what is not read again.
    """

    call_us: float
    call_thread_us: float
    loop_us: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostTime:
    """Host time of one schedule; the first six describe a gradient.

    Attributes:
      num_tasks: how many of its operations are tasks.
      num_transfers: how many are transfers.
      num_other: how many are neither.
      num_values: how many values the transfers carry.
      operations: the time of one of each kind; kinds without one are missing.
      host_us_per_task: of all operations, calls and loop, over the tasks.
      thread_us_per_task: the whole gradient over its tasks, on the clock of the thread.
      wall_us_per_task: the same on a wall clock, waits for the devices included.
      step_thread_us_per_task: a whole call of the training step, with all that is done before and
        after the executor's loop, over its tasks, on the clock of the thread.
    """

    num_tasks: int
    num_transfers: int
    num_other: int
    num_values: int
    operations: dict[str, OperationTime]
    host_us_per_task: float
    thread_us_per_task: float
    wall_us_per_task: float
    step_thread_us_per_task: float


def measure_host_time(
    schedule: str, *, num_devices: int, num_microbatches: int, num_steps: int
) -> HostTime:
    """Runs a network of one tiny layer a device, `num_steps` times for each measurement."""
    pipelined = jaxptis.pipeline(
        _loss,
        num_microbatches=num_microbatches,
        devices=jax.devices()[:num_devices],
        strategy=schedule,
    )
    params = [np.full((WIDTH, WIDTH), 0.1, np.float32) for _ in range(num_devices)]
    batch = np.ones((num_microbatches, WIDTH), np.float32)
    call = pipelined.bind(None, params, batch)
    inputs = jax.block_until_ready([*call.params_buffers(), *call.batch_buffers()])
    executable = call.compiled.gradient_step.executable
    instructions = [step.ends[0][1] for step in in_one_order(executable.rows)]
    kinds = [_kind(each) for each in instructions]
    calls_us, loops_us = _time_operations(executable, inputs, num_steps, time.perf_counter)
    threads_us, _ = _time_operations(executable, inputs, num_steps, time.thread_time)

    step = pipelined.train_step(optax.sgd(0.1))
    state = [step.init(params, batch)]

    def take_step() -> Any:
        state[0], metrics = step(state[0], batch)
        return state[0].params, metrics

    def gradient() -> Any:
        return executable(inputs)

    num_tasks = executable.num_tasks
    return HostTime(
        num_tasks=num_tasks,
        num_transfers=kinds.count("transfer"),
        num_other=kinds.count("other"),
        num_values=sum(
            len(each.sends) + len(each.receives)
            for each in instructions
            if not isinstance(each, Run)
        ),
        operations={
            kind: OperationTime(
                call_us=_mean(calls_us, kinds, kind),
                call_thread_us=_mean(threads_us, kinds, kind),
                loop_us=_mean(loops_us, kinds, kind),
            )
            for kind in KINDS
            if kind in kinds
        },
        host_us_per_task=sum([*calls_us, *loops_us]) / num_tasks,
        thread_us_per_task=_median_us(gradient, num_steps, time.thread_time) / num_tasks,
        wall_us_per_task=_median_us(gradient, num_steps, time.perf_counter) / num_tasks,
        step_thread_us_per_task=_median_us(take_step, num_steps, time.thread_time) / num_tasks,
    )


def _loss(params: Sequence[jax.Array], batch: jax.Array) -> jax.Array:
    x = batch
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return jnp.mean(x)


def _kind(instruction: Any) -> str:
    if not isinstance(instruction, Run):
        return "transfer"
    return "other" if instruction.task is None else "task"


class _Stopwatch:
    """Times the calls of a step's operations, and what lies between them, in microseconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.calls_us: list[float] = []
        self.loops_us: list[float] = []
        self._clock = clock
        self._returned_s: float | None = None

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that is timed from when its inputs are ready."""

        def timed(*values: Any) -> Any:
            self.lap()
            jax.block_until_ready(values)
            start_s = self._clock()
            results = call(*values)
            self._returned_s = self._clock()
            self.calls_us.append((self._returned_s - start_s) * 1e6)
            return results

        return timed

    def lap(self) -> None:
        """Count the time since the last call returned, if there was one, as the loop's own."""
        if self._returned_s is not None:
            self.loops_us.append((self._clock() - self._returned_s) * 1e6)


def _time_operations(
    executable: Executable, inputs: Sequence[Any], num_steps: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Returns medians, for each operation, of its call and of the loop behind it.

    It is the executable's own loop that runs, in a copy of which the calls are wrapped.
    """
    instrumented = copy.copy(executable)
    watches = [_Stopwatch(clock) for _ in range(num_steps)]
    for watch in watches:
        instrumented._ops = [
            dataclasses.replace(op, call=watch.wrap(op.call)) for op in executable._ops
        ]
        results = instrumented(inputs)
        watch.lap()
        jax.block_until_ready(results)
    return (
        [statistics.median(times) for times in zip(*(w.calls_us for w in watches), strict=True)],
        [statistics.median(times) for times in zip(*(w.loops_us for w in watches), strict=True)],
    )


def _mean(times: Sequence[float], kinds: Sequence[str], kind: str) -> float:
    return statistics.mean(t for t, k in zip(times, kinds, strict=True) if k == kind)


def _median_us(call: Callable[[], Any], num_calls: int, clock: Callable[[], float]) -> float:
    """Returns the median time of a call that begins when the one before is done."""
    jax.block_until_ready(call())
    times_s = []
    for _ in range(num_calls):
        start_s = clock()
        results = call()
        times_s.append(clock() - start_s)
        jax.block_until_ready(results)
    return statistics.median(times_s) * 1e6
