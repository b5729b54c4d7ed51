"""Steps whose tasks sleep for what they cost: so two cores can hold many devices.

All else is the executor's as it is: its lists, and its transfers of arrays of the same sizes. What
is no task, such as zeros of sums, takes no time.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxptis.call import Compiled
from jaxptis.compile import Pipeline
from jaxptis.executor.compiled import CompiledProgram, Compiler
from jaxptis.executor.programs import ProgramSpec
from jaxptis.executor.stage_tasks import stage_program_name
from jaxptis.performance import Costs, Timeline
from jaxptis.plan import Plan
from jaxptis.profile import measured_timeline


def slower(costs: Costs, factor: float) -> Costs:
    """Returns costs in which all takes this many times as long."""
    names = ("forward_s", "backward_s", "input_grad_s", "weight_grad_s", "recompute_s")
    layers = (
        dataclasses.replace(layer, **{name: factor * getattr(layer, name) for name in names})
        for layer in costs.layers
    )
    return dataclasses.replace(costs, layers=tuple(layers))


def seconds_of(plan: Plan, costs: Costs) -> dict[str, float]:
    """Returns what the tasks of a plan take, by the names of their programs."""
    ranges = [range(start, end) for start, end in pairwise(plan.boundaries)]
    return {
        stage_program_name(stage, kind): costs.task_s(layers, kind, plan.stages[stage].recompute)
        for stage, layers in enumerate(ranges)
        for kind in "FBIW"
    }


class _TaskCompiler(Compiler):
    """Knows what the tasks of a plan take."""

    def __init__(self, devices: Sequence[jax.Device], plan: Plan, costs: Costs) -> None:
        super().__init__(devices)
        self._task_s = seconds_of(plan, costs)


class _StandIn:
    """What stands for a lowered program, and for a compiled one."""

    def compile(self, compiler_options: Mapping[str, Any]) -> Self:
        return self


class DrowsyCompiler(_TaskCompiler):
    """Compiles programs that also sleep, in steps that are recorded, until their time is over.

    That time is what their task costs, times the factor of their device. In other steps they do not
    sleep: there one thread starts the programs of all devices, one after the other.

    Attributes:
        factors: of the devices; to be changed at any time.
    """

    def __init__(self, devices: Sequence[jax.Device], plan: Plan, costs: Costs) -> None:
        super().__init__(devices, plan, costs)
        self.factors = [1.0] * len(devices)

    def programs(
        self, specs: Mapping[str, ProgramSpec], donated: Mapping[str, tuple[int, ...]]
    ) -> dict[str, CompiledProgram]:
        """Compiles the programs, by name."""
        return {
            name: CompiledProgram(
                program.spec,
                functools.partial(_Drowsy, program, self._task_s.get(name, 0.0), self.factors),
                {},
            )
            for name, program in super().programs(specs, donated).items()
        }


class _Drowsy(_StandIn):
    def __init__(self, program: CompiledProgram, task_s: float, factors: list[float]) -> None:
        self._program, self._task_s, self._factors = program, task_s, factors

    def memory_analysis(self) -> Any:
        return self._program.memory_analysis()

    def __call__(self, *inputs: jax.Array) -> Sequence[jax.Array]:
        if threading.current_thread() is threading.main_thread():
            return self._program.compiled(*inputs)
        start_s = time.perf_counter()
        results = jax.block_until_ready(self._program.compiled(*inputs))
        task_s = self._task_s * self._factors[self._program.spec.device]
        time.sleep(max(0.0, start_s + task_s - time.perf_counter()))
        return results


class SleepingCompiler(_TaskCompiler):
    """Compiles transfers; all programs sleep for what their task costs, and return zeros."""

    def programs(
        self, specs: Mapping[str, ProgramSpec], donated: Mapping[str, tuple[int, ...]]
    ) -> dict[str, CompiledProgram]:
        """Returns what stands for the programs, by name."""
        return {
            name: CompiledProgram(
                spec,
                functools.partial(_Sleeper, spec, self._task_s.get(name, 0.0), self.devices),
                {},
            )
            for name, spec in specs.items()
        }


class _Sleeper(_StandIn):
    def __init__(self, spec: ProgramSpec, task_s: float, devices: Sequence[jax.Device]) -> None:
        self._task_s = task_s
        self._results = [
            jax.device_put(jnp.zeros(aval.shape, aval.dtype), devices[spec.device])
            for aval in spec.out_avals
        ]

    def memory_analysis(self) -> None:
        """Nothing is known of it."""

    def __call__(self, *inputs: jax.Array) -> list[jax.Array]:
        jax.block_until_ready(inputs)
        if self._task_s:
            time.sleep(self._task_s)
        return self._results


def measure_asleep(pipeline: Pipeline, params: Any, batch: Any, num_steps: int) -> Timeline:
    """Returns the timeline of median length of the steps of a pipeline whose tasks sleep.

    Args:
        pipeline: of which only the gradient is run.
        params: the arrays or their types.
        batch: the arrays or their types.
        num_steps: how many steps to take, after one to warm up.
    """
    analysis = pipeline.analysis
    devices = analysis.options.devices
    compiled = Compiled(pipeline, SleepingCompiler(devices, pipeline.plan, analysis.costs))
    executable = compiled.gradient_step.executable
    inputs = [
        buffer
        for placement, tree in ((compiled.params, params), (compiled.batch, batch))
        for buffer in placement.buffers(placement.put([*map(_zeros, jax.tree.leaves(tree))]))
    ]
    timelines = []
    for _ in range(1 + num_steps):
        _, happenings = executable.record(inputs)
        timelines.append(measured_timeline(executable, devices, happenings())[0])
    return sorted(timelines[1:], key=lambda timeline: timeline.step_s)[num_steps // 2]


def _zeros(x: Any) -> np.ndarray:
    return np.zeros(x.shape, x.dtype)
