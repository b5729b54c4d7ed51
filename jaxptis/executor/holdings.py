"""What the devices of a pipeline hold, and the memory that it takes."""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxptis.cluster import Cluster
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.draft import Copies, Homes
from jaxptis.executor.emit_tasks import emit_tasks
from jaxptis.executor.instructions import Rows
from jaxptis.executor.memory import DeviceMemory, predict_memory
from jaxptis.executor.programs import INDEX, Aval, BatchLeaf
from jaxptis.executor.stage_tasks import MICROBATCH, task_programs
from jaxptis.executor.tasks import TaskPrograms
from jaxptis.performance import Costs
from jaxptis.performance.task_costs import task_costs
from jaxptis.plan import Plan
from passes import jaxprs
from passes.differentiate import accumulator_dtype
from passes.stages import Role, StageGradient, StageProgram, Stages


class Analysis(Protocol):
    """What a step must know of the loss function; `jaxptis.compile.Analysis` is one."""

    @property
    def costs(self) -> Costs: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def batch(self) -> tuple[BatchLeaf, ...]: ...
    @property
    def result_axes(self) -> tuple[int | None, ...]: ...


class Pipeline(Protocol):
    """What a step is made from; `jaxptis.compile.Pipeline` is one."""

    @property
    def analysis(self) -> Analysis: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def stages(self) -> Stages: ...
    @property
    def gradients(self) -> tuple[StageGradient, ...]: ...
    @property
    def programs(self) -> Mapping[tuple[int, str], StageProgram]: ...
    @property
    def homes(self) -> tuple[Homes, ...]: ...


def param_copies(pipeline: Pipeline) -> Copies:
    """Return where the parameters live."""
    avals = jaxprs.avals(pipeline.stages.program.param_vars)
    return Copies(homes=pipeline.homes, prefix="param", avals=tuple(avals))


def batch_copies(pipeline: Pipeline) -> Copies:
    """Return which devices read each leaf of the batch."""
    readers: list[set[int]] = [set() for _ in pipeline.analysis.batch]
    for stage, placed in zip(pipeline.stages.stages, pipeline.plan.stages, strict=True):
        for i in stage.batch:
            readers[i].add(placed.device)
    return Copies(
        homes=tuple(tuple(sorted(devices)) for devices in readers),
        prefix="batch",
        avals=tuple(leaf.aval for leaf in pipeline.analysis.batch),
    )


def result_homes(pipeline: Pipeline, compiler: Compiler) -> list[Homes]:
    """Return where each result is: where it is made, and on a device of every other process."""
    made = {
        r: placed.device
        for stage, placed in zip(pipeline.stages.stages, pipeline.plan.stages, strict=True)
        for r in stage.results
    }
    return [compiler.one_per_process(made[r]) for r in sorted(made)]


def tasks_of(pipeline: Pipeline, programs: Mapping[tuple[int, str], StageProgram]) -> TaskPrograms:
    """Return what the tasks of a plan run, of these programs."""
    homes = [placed.device for placed in pipeline.plan.stages]
    return task_programs(programs, homes=homes, batch=pipeline.analysis.batch)


def predicted_memory(pipeline: Pipeline, *state: Copies) -> tuple[DeviceMemory, ...]:
    """Return what the lists say of the memory of a step, until its last task ends.

    What follows the tasks, such as an update, may take more.

    Args:
      pipeline: what runs.
      *state: what else lasts: the optimizer's.
    """
    params, batch = param_copies(pipeline), batch_copies(pipeline)
    sums = Copies(
        homes=params.homes,
        prefix="sum",
        avals=tuple(Aval(a.shape, accumulator_dtype(a.dtype)) for a in params.avals),
    )
    resident = [0] * pipeline.plan.num_devices
    for copies in params, batch, sums, *state:
        for (device, _), aval in copies.buffers().items():
            resident[device] += jaxprs.nbytes([aval])
    programs = pipeline.programs
    for device, values in _constants(pipeline).items():
        resident[device] += sum(value.nbytes for value in values)
    tasks = tasks_of(pipeline, programs)
    nbytes = {
        ref.name: jaxprs.nbytes([v.aval])
        for key, program in programs.items()
        for refs, values in (
            (tasks[key].reads[-len(program.reads) :], program.jaxpr.invars),
            (tasks[key].writes, program.jaxpr.outvars),
        )
        for ref, v in zip(refs, values, strict=True)
    }
    nbytes[MICROBATCH.name] = jaxprs.nbytes([INDEX])
    passing = {
        ref.of(microbatch): nbytes[ref.name]
        for task in tasks.values()
        for ref in (*task.reads, *task.writes)
        if ref.per_microbatch
        for microbatch in range(pipeline.plan.num_microbatches)
    }
    costs = task_costs(pipeline.plan, pipeline.analysis.costs, pipeline.analysis.cluster)
    rows = Rows(pipeline.plan.num_devices)
    emit_tasks(rows, pipeline.plan, costs, tasks)
    return predict_memory(rows, passing, resident)


def _constants(pipeline: Pipeline) -> dict[int, list[Any]]:
    """Return the arrays that the programs on each device close over."""
    read = {
        (s, x.index)
        for (s, _), program in pipeline.programs.items()
        for x in program.reads
        if x.role == Role.CONSTANT
    }
    found: dict[int, list[Any]] = {}
    for s, k in sorted(read):
        value = pipeline.gradients[s].constants[k]
        found.setdefault(pipeline.plan.stages[s].device, []).append(value)
    return found
