"""The whole journey, from a loss function to the programs of its stages."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxptis.choose_costs import choose_costs
from jaxptis.cluster import Cluster
from jaxptis.executor.programs import BatchLeaf
from jaxptis.make_plan import check_strategy, make_plan
from jaxptis.microbatches import aux_axes, batch_leaves
from jaxptis.options import Options
from jaxptis.parts import Cuts, is_parts
from jaxptis.performance import Costs, Timeline, simulate
from jaxptis.performance.check_memory import fits_memory
from jaxptis.performance.layer_costs import with_state_bytes
from jaxptis.performance.optimizer_state import optimizer_state_bytes
from jaxptis.plan import Plan
from jaxptis.processes import Processes
from passes import PROGRAM_PASSES, STAGE_PASSES
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.hand_on import hand_on
from passes.layers import LayerGraph, find_layers
from passes.runner import Dump, run
from passes.split_backward import split_backward
from passes.stages import Operand, Role, StageGradient, StageProgram, Stages
from passes.trace import trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """What is known of a loss function at given shapes before it is planned.

    Attributes:
      options: what the user chose.
      params: its parameters, as a pytree of types.
      graph: its layers.
      costs: of each layer.
      batch: the leaves of the whole batch.
      result_axes: for each result, the axis along which the microbatches' are concatenated, or
        None for their mean. The loss is the first.
      aux: the auxiliary output of a microbatch, as a pytree of types.
      dump: where the forms of the program are written.
    """

    options: Options
    params: Any
    graph: LayerGraph
    costs: Costs
    batch: tuple[BatchLeaf, ...]
    result_axes: tuple[int | None, ...]
    aux: Any
    dump: Dump

    @property
    def cluster(self) -> Cluster:
        """The devices of the pipeline."""
        return self.options.cluster

    def costs_with(self, optimizer: optax.GradientTransformation | None) -> Costs:
        """Return the costs with the state of an optimizer, if there is one."""
        if optimizer is None:
            return self.costs
        state_bytes = optimizer_state_bytes(self.graph.program, self.params, optimizer)
        held = [layer.params for layer in self.graph.layers]
        return with_state_bytes(self.costs, held, state_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A loss function, at given shapes, as a pipeline.

    Attributes:
      analysis: the loss function.
      plan: partition, placement and schedule.
      timeline: the predicted step.
      stages: the forward programs and what crosses between them.
      gradients: the forward and backward of every stage.
      programs: by stage and kind of task, what the tasks of the plan run.
    """

    analysis: Analysis
    plan: Plan
    timeline: Timeline
    stages: Stages
    gradients: tuple[StageGradient, ...]
    programs: Mapping[tuple[int, str], StageProgram]

    @property
    def homes(self) -> tuple[tuple[int, ...], ...]:
        """For each parameter the devices that hold it; the first updates it."""
        homes: list[dict[int, None]] = [{} for _ in self.stages.program.params]
        for stage, placed in zip(self.stages.stages, self.plan.stages, strict=True):
            for p in stage.params:
                homes[p][placed.device] = None
        return tuple(map(tuple, homes))


@dataclasses.dataclass(frozen=True)
class Given:
    """Arrays that a loss function is called with: the leaves of its parameters and its batch."""

    params: Sequence[Any]
    batch: Sequence[Any]

    @classmethod
    def of(cls, params: Sequence[Any], batch: Sequence[Any]) -> "Given | None":
        """Return these leaves if each is an array that is whole in this process."""
        return cls(params, batch) if all(map(_is_here, (*params, *batch))) else None

    def values(self, graph: LayerGraph, batch: Sequence[BatchLeaf]) -> dict[Operand, Any]:
        """Return the parts of the parameters, and the first microbatch, by their operands."""
        program = graph.program
        cuts = Cuts(program.pieces, [aval.shape for aval in program.leaf_avals])
        arrays = (x if isinstance(x, jax.Array) else np.asarray(x) for x in self.batch)
        first = (leaf.microbatch(x, 0) for leaf, x in zip(batch, arrays, strict=True))
        return {
            **{Operand(Role.PARAM, p): x for p, x in enumerate(cuts.cut(self.params))},
            **{Operand(Role.BATCH, i): x for i, x in enumerate(first)},
        }


def _is_here(leaf: Any) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct) or is_parts(leaf):
        return False
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def compile_pipeline(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    options: Options,
    *,
    optimizer: optax.GradientTransformation | None = None,
    given: Given | None = None,
    previous: Plan | None = None,
) -> Pipeline:
    """Plan a loss function and cut it into stages; see `analyse`.

    It is planned for training steps with an optimizer, whose state takes memory, or for gradients.
    The `previous` plan, made for other shapes, is kept if the layers are the same.
    """
    planned: list[tuple[Analysis, Plan]] = []
    errors: list[ValueError] = []
    for count in options.head_slices:
        chosen = dataclasses.replace(options, head_slices=(count,))
        if options.dump_to is not None and len(options.head_slices) > 1:
            folder = os.path.join(options.dump_to, f"head_slices_{count}")
            chosen = dataclasses.replace(chosen, dump_to=folder)
        try:
            analysis = analyse(loss_fn, params, batch, chosen, given=given, previous=previous)
            if previous is not None and previous.layers == analysis.graph.names:
                return build(analysis, previous)
            planned.append((analysis, _plan(analysis, optimizer)))
        except ValueError as error:
            errors.append(error)
    if not planned:
        raise errors[0]
    if len(planned) == 1:
        return build(*planned[0])
    return build(*min(planned, key=lambda each: _step_s(each[0], each[1], optimizer)))


def _plan(analysis: Analysis, optimizer: optax.GradientTransformation | None) -> Plan:
    """Plan in the first process for all: by other processors' arithmetic other plans are best."""
    options = analysis.options

    def plan() -> Plan:
        return make_plan(
            analysis.costs_with(optimizer),
            options.strategy,
            cluster=analysis.cluster,
            num_microbatches=options.num_microbatches,
        )

    if jax.process_count() == 1:
        return plan()
    return Plan.parse(Processes(options.devices).of_first(lambda: plan().text()))


def _step_s(
    analysis: Analysis, plan: Plan, optimizer: optax.GradientTransformation | None
) -> float:
    """Return the step of a plan; infinite if a device has too little memory."""
    costs, cluster = analysis.costs_with(optimizer), analysis.cluster
    timeline = simulate(plan, costs, cluster, blocking=True)
    return timeline.step_s if fits_memory(timeline, cluster) else math.inf


def analyse(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    options: Options,
    *,
    given: Given | None = None,
    previous: Plan | None = None,
) -> Analysis:
    """Find the layers of a loss function and what they cost.

    Args:
      loss_fn: maps parameters and a batch to a scalar mean, or to (scalar, aux).
      params: pytree of `jax.ShapeDtypeStruct`.
      batch: pytree of `jax.ShapeDtypeStruct`, the whole batch.
      options: what the user chose.
      given: the arrays, if they are there: layers may be measured on them.
      previous: a plan that is used in place of the strategy if it has the same layers.

    Raises:
      ValueError: there are no layers, the strategy does not fit them, or the costs do not.
    """
    leaves = batch_leaves(batch, options)
    microbatch = jax.tree.unflatten(
        jax.tree.structure(batch), [leaf.microbatch_aval() for leaf in leaves]
    )
    dump = Dump(options.dump_to)

    program, aux = trace(loss_fn, params, microbatch, has_aux=options.has_aux)
    dump.step("traced", program.text())
    program = dataclasses.replace(program, head_slices=options.head_slices[0])
    program = run(program, PROGRAM_PASSES, dump)
    graph = find_layers(program)
    dump.step("layers", graph.text())
    if previous is None or previous.layers != graph.names:
        _check_strategy(options, graph.names)
    measured_on = given if options.costs == "measured" else None
    values = {} if measured_on is None else measured_on.values(graph, leaves)
    return Analysis(
        options=options,
        params=params,
        graph=graph,
        costs=choose_costs(graph, options, values),
        batch=leaves,
        result_axes=(None, *aux_axes(loss_fn, params, batch, aux, options)),
        aux=aux,
        dump=dump,
    )


def _check_strategy(options: Options, layers: Sequence[str]) -> None:
    """Check in the first process, which alone need have the file of a plan.

    Raises:
      ValueError: the strategy does not fit, or the processes have other layers or microbatches.
    """
    processes = Processes(options.devices)
    processes.check_same(
        "layers and microbatches", f"{options.num_microbatches} {' '.join(layers)}"
    )

    def check() -> str:
        check_strategy(
            options.strategy,
            layers,
            num_devices=len(options.devices),
            num_microbatches=options.num_microbatches,
        )
        return ""

    processes.of_first(check)


def build(analysis: Analysis, plan: Plan) -> Pipeline:
    """Cut what was analysed into the stages of a plan."""
    dump = analysis.dump
    dump.step("plan", plan.text())
    timeline = simulate(plan, analysis.costs, analysis.cluster, blocking=True)
    dump.step("timeline", timeline.text())
    stages = hand_on(cut_stages(analysis.graph, plan.boundaries))
    dump.step("stages", stages.text())
    stages = run(stages, STAGE_PASSES, dump)
    gradients = differentiate(stages, recompute=[stage.recompute for stage in plan.stages])
    return Pipeline(
        analysis=analysis,
        plan=plan,
        timeline=timeline,
        stages=stages,
        gradients=gradients,
        programs=_programs(plan, gradients),
    )


def _programs(
    plan: Plan, gradients: Sequence[StageGradient]
) -> dict[tuple[int, str], StageProgram]:
    """Return what the tasks of a plan run, by stage and kind; none where there is nothing to do."""
    kinds = {(task.stage, task.kind) for row in plan.schedule for task in row}
    programs: dict[tuple[int, str], StageProgram | None] = {}
    for s, gradient in enumerate(gradients):
        split = split_backward(gradient.backward)
        programs[s, "F"], programs[s, "B"] = gradient.forward, gradient.backward
        programs[s, "I"], programs[s, "W"] = split.input_grad, split.weight_grad
    return {key: p for key, p in programs.items() if p is not None and key in kinds}
