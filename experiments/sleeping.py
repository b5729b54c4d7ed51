"""Steps whose tasks sleep for what they cost: so two cores can hold many devices.

All else is the executor's as it is: its lists, and its transfers of arrays of the same sizes. What
is no task, such as zeros of sums, takes no time.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from jaxptis.executor.compiled import CompiledProgram, Compiler
from jaxptis.executor.programs import ProgramSpec
from jaxptis.executor.stage_tasks import stage_program_name
from jaxptis.performance import Costs
from jaxptis.plan import Plan


class SleepingCompiler(Compiler):
    """Compiles transfers; all programs sleep for what their task costs, and return zeros."""

    def __init__(self, devices: Sequence[jax.Device], plan: Plan, costs: Costs) -> None:
        super().__init__(devices)
        ranges = [range(start, end) for start, end in pairwise(plan.boundaries)]
        self._task_s = {
            stage_program_name(stage, kind): costs.task_s(
                layers, kind, plan.stages[stage].recompute
            )
            for stage, layers in enumerate(ranges)
            for kind in "FBIW"
        }

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


class _Sleeper:
    """What stands for a lowered program."""

    def __init__(self, spec: ProgramSpec, task_s: float, devices: Sequence[jax.Device]) -> None:
        self._spec, self._task_s, self._device = spec, task_s, devices[spec.device]

    def compile(self, compiler_options: Mapping[str, Any]) -> Any:
        results = [
            jax.device_put(jnp.zeros(aval.shape, aval.dtype), self._device)
            for aval in self._spec.out_avals
        ]

        def run(*inputs: jax.Array) -> list[jax.Array]:
            jax.block_until_ready(inputs)
            if self._task_s:
                time.sleep(self._task_s)
            return results

        return run
