"""The whole journey, from a loss function to the programs of its stages."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise, zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from jaxptis.cluster import Cluster
from jaxptis.executor.programs import BatchLeaf
from jaxptis.optimizer import balance
from jaxptis.performance import Costs, Timeline, simulate
from jaxptis.performance.estimate import estimate
from jaxptis.plan import Plan, Schedule, StagePlan, schedule_from_csv
from jaxptis.plan.csv import placement_of
from jaxptis.schedules import (
    FAMILIES,
    StageCosts,
    check_fills_stages,
    names_family,
    placement,
    schedule,
)
from passes import PROGRAM_PASSES, STAGE_PASSES
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.layers import LayerGraph, find_layers
from passes.runner import Dump, run
from passes.split_backward import split_backward
from passes.stages import StageGradient, StageProgram, Stages
from passes.trace import trace
from passes.work import count_work

Strategy = str | PathLike[str] | Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user chooses; see `jaxptis.pipeline`."""

    num_microbatches: int
    devices: tuple[Any, ...]
    strategy: Strategy
    batch_axes: Any
    has_aux: bool
    cluster: Cluster
    dump_to: str | None
    head_slices: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """What is known of a loss function at given shapes before it is planned.

    Attributes:
      options: what the user chose.
      graph: its layers.
      costs: predicted seconds of each layer.
      batch: the leaves of the whole batch.
      result_axes: for each result, the axis along which the microbatches' are concatenated, or
        None for their mean. The loss is the first.
      aux: the auxiliary output of a microbatch, as a pytree of types.
      dump: where the forms of the program are written.
    """

    options: Options
    graph: LayerGraph
    costs: Costs
    batch: tuple[BatchLeaf, ...]
    result_axes: tuple[int | None, ...]
    aux: Any
    dump: Dump


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


def compile_pipeline(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    options: Options,
    *,
    previous: Plan | None = None,
) -> Pipeline:
    """Plan a loss function and cut it into stages; see `analyse`.

    The `previous` plan, made for other shapes, is kept if the layers are the same.
    """
    analysis = analyse(loss_fn, params, batch, options)
    layers = tuple(layer.name for layer in analysis.graph.layers)
    if previous is not None and previous.layers == layers:
        return build(analysis, previous)
    return build(analysis, make_plan(layers, analysis.costs, options))


def analyse(
    loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any, options: Options
) -> Analysis:
    """Find the layers of a loss function and what they cost.

    Args:
      loss_fn: maps parameters and a batch to a scalar mean, or to (scalar, aux).
      params: pytree of `jax.ShapeDtypeStruct`.
      batch: pytree of `jax.ShapeDtypeStruct`, the whole batch.
      options: what the user chose.
    """
    leaves = batch_leaves(batch, options)
    microbatch = jax.tree.unflatten(
        jax.tree.structure(batch), [leaf.microbatch_aval() for leaf in leaves]
    )
    dump = Dump(options.dump_to)

    program, aux = trace(loss_fn, params, microbatch, has_aux=options.has_aux)
    dump.step("traced", program.text())
    program = dataclasses.replace(program, head_slices=options.head_slices)
    program = run(program, PROGRAM_PASSES, dump)
    graph = find_layers(program)
    dump.step("layers", graph.text())
    return Analysis(
        options=options,
        graph=graph,
        costs=estimate(count_work(graph), options.cluster.devices[0]),
        batch=leaves,
        result_axes=(None, *_aux_axes(loss_fn, params, batch, aux, options)),
        aux=aux,
        dump=dump,
    )


def build(analysis: Analysis, plan: Plan) -> Pipeline:
    """Cut what was analysed into the stages of a plan."""
    dump = analysis.dump
    dump.step("plan", plan.text())
    timeline = simulate(plan, analysis.costs)
    dump.step("timeline", timeline.text())
    stages = cut_stages(analysis.graph, plan.boundaries)
    dump.step("stages", stages.text())
    stages = run(stages, STAGE_PASSES, dump)
    gradients = differentiate(stages, recomputed=plan.recomputed)
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


def batch_leaves(batch: Any, options: Options) -> tuple[BatchLeaf, ...]:
    """Match the batch with `batch_axes`.

    Raises:
      ValueError: the axes do not fit the batch, or microbatches do not divide it.
    """
    try:
        axes = jax.tree.broadcast(options.batch_axes, batch, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            f"batch_axes {options.batch_axes!r} is no prefix of the batch, which is "
            f"{jax.tree.structure(batch)}; give an int, None, or a tree like the batch"
        ) from error
    paths = jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda x: x is None)
    flat = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
    count = options.num_microbatches
    leaves = []
    for (path, aval), axis in zip(paths, flat, strict=True):
        if aval is None:  # a batch may leave something out, and None is no leaf then
            continue
        name = f"batch leaf {jax.tree_util.keystr(path) or '(the whole batch)'}"
        if axis is not None and not -len(aval.shape) <= axis < len(aval.shape):
            raise ValueError(
                f"{name} has shape {aval.shape}, so it has no batch axis {axis}; give its axis in "
                "batch_axes, or None to pass it whole to every microbatch"
            )
        length = count if axis is None else aval.shape[axis]
        if length % count or length == 0:
            raise ValueError(
                f"{name} has shape {aval.shape}: {count} microbatches do not divide its batch of "
                f"{length}; change the batch or num_microbatches, or set its batch_axes to None "
                "to pass it whole to every microbatch"
            )
        positive = None if axis is None else axis % len(aval.shape)
        leaves.append(BatchLeaf(aval=aval, axis=positive, size=length // count))
    return tuple(leaves)


def make_plan(layers: Sequence[str], costs: Costs, options: Options) -> Plan:
    """Make or check the plan for layers of these names.

    Raises:
      ValueError: the strategy is not known, or the plan does not fit the model or the devices.
    """
    strategy = options.strategy
    if isinstance(strategy, str) and names_family(strategy):
        return _named_plan(strategy, layers, costs, options)
    if not isinstance(strategy, Plan) and str(strategy).endswith(".csv"):
        plan = _csv_plan(strategy, layers, costs)
    else:
        plan = strategy if isinstance(strategy, Plan) else _load_plan(strategy)
    _check_plan(plan, layers, options)
    return plan


def _named_plan(strategy: str, layers: Sequence[str], costs: Costs, options: Options) -> Plan:
    num_devices = len(options.devices)
    check_fills_stages(strategy, num_devices=num_devices, num_layers=len(layers))
    devices = placement(strategy, num_devices=num_devices)
    edges = _balance(costs, len(devices))
    ranges = [range(start, end) for start, end in pairwise(edges)]
    rows = schedule(
        strategy,
        num_devices=num_devices,
        num_microbatches=options.num_microbatches,
        costs=StageCosts(
            forward_s=tuple(costs.task_s(each, "F") for each in ranges),
            backward_s=tuple(costs.task_s(each, "B") for each in ranges),
            input_grad_s=tuple(costs.task_s(each, "I") for each in ranges),
            weight_grad_s=tuple(costs.task_s(each, "W") for each in ranges),
        ),
    )
    return _assemble(layers, edges, devices, rows)


def _csv_plan(path: str | PathLike[str], layers: Sequence[str], costs: Costs) -> Plan:
    """Place stages where the rows have them, and balance the layers over them."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"strategy {path!r} cannot be read ({error}); give the path of a text file in UTF-8"
        ) from error
    rows = schedule_from_csv(text, source=str(path))
    try:
        devices = placement_of(rows)
        if len(layers) < len(devices):
            raise ValueError(
                f"{len(layers)} layers cannot fill its {len(devices)} stages; use a schedule of "
                f"{len(layers)} stages or fewer"
            )
        return _assemble(layers, _balance(costs, len(devices)), devices, rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _balance(costs: Costs, num_stages: int) -> tuple[int, ...]:
    return balance([cost.forward_s + cost.backward_s for cost in costs.layers], num_stages)


def _assemble(
    layers: Sequence[str], edges: Sequence[int], devices: Sequence[int], rows: Schedule
) -> Plan:
    stages = (
        StagePlan(layers=tuple(layers[start:end]), device=device)
        for (start, end), device in zip(pairwise(edges), devices, strict=True)
    )
    return Plan(stages=tuple(stages), schedule=rows)


def _load_plan(strategy: str | PathLike[str]) -> Plan:
    try:
        return Plan.load(strategy)
    except (OSError, TypeError, UnicodeDecodeError) as error:
        close = get_close_matches(str(strategy).partition("(")[0], FAMILIES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"strategy {strategy!r} is neither a schedule ({', '.join(FAMILIES)}) nor the path of "
            f"a plan file that can be read ({error}); {hint}change it, or write the file with "
            "plan.save(path)"
        ) from error


def _check_plan(plan: Plan, layers: Sequence[str], options: Options) -> None:
    for index, (planned, found) in enumerate(zip_longest(plan.layers, layers)):
        if planned != found:
            raise ValueError(
                f"the plan is for another model: its layer {index} is {planned!r}, the model's is "
                f"{found!r} (the plan has {len(plan.layers)} layers, the model {len(layers)}); "
                "use a plan of this model"
            )
    if plan.num_microbatches != options.num_microbatches:
        raise ValueError(
            f"the plan has {plan.num_microbatches} microbatches, but num_microbatches is "
            f"{options.num_microbatches}; make them equal"
        )
    if plan.num_devices > len(options.devices):
        raise ValueError(
            f"the plan needs {plan.num_devices} devices, but {len(options.devices)} are given; "
            "pass more devices or use another plan"
        )
    if all(task.kind == "F" for row in plan.schedule for task in row):
        raise ValueError(
            "the plan has forwards only; give every stage and microbatch a backward, too: "
            "B, or I and W"
        )


def _aux_axes(
    loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any, aux: Any, options: Options
) -> list[int | None]:
    """Return the axis of each auxiliary leaf that grows with the batch; None where none does.

    Raises:
      ValueError: a leaf neither grows with the batch in one axis nor has a mean.
    """
    if not options.has_aux or not jax.tree.leaves(aux):
        return []
    _, whole = jax.eval_shape(loss_fn, params, batch)
    axes: list[int | None] = []
    for (path, part), full in zip(
        jax.tree_util.tree_leaves_with_path(aux), jax.tree.leaves(whole), strict=True
    ):
        name = f"auxiliary output {jax.tree_util.keystr(path)}"
        grown = [i for i, (a, b) in enumerate(zip(part.shape, full.shape, strict=True)) if a != b]
        if not grown and options.num_microbatches > 1:
            if not jax.numpy.issubdtype(part.dtype, jax.numpy.inexact):
                raise ValueError(
                    f"{name} has dtype {part.dtype} and no batch axis, so microbatches have no "
                    "mean; return a float mean, or one value a sample"
                )
            axes.append(None)
        elif not grown:
            axes.append(None)
        elif len(grown) == 1 and full.shape[grown[0]] == (
            part.shape[grown[0]] * options.num_microbatches
        ):
            axes.append(grown[0])
        else:
            raise ValueError(
                f"{name} has shape {part.shape} for a microbatch and {full.shape} for the batch; "
                f"one axis must be {options.num_microbatches} times as long, or none"
            )
    return axes
