"""The whole journey, from a loss function to the programs of its stages."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from os import PathLike
from typing import Any

import jax

from jaxptis.cluster import Cluster
from jaxptis.executor.programs import BatchLeaf
from jaxptis.optimizer import balance
from jaxptis.performance import Costs, Timeline, simulate
from jaxptis.performance.estimate import estimate
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import FAMILIES, schedule
from passes import PROGRAM_PASSES
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.layers import find_layers
from passes.runner import Dump, run
from passes.stages import StageGradient, Stages
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
class Pipeline:
    """A loss function, at given shapes, as a pipeline.

    Attributes:
      options: what the user chose.
      plan: partition, placement and schedule.
      costs: predicted seconds of each layer.
      timeline: the predicted step.
      stages: the forward programs and what crosses between them.
      gradients: the forward and backward programs.
      batch: the leaves of the whole batch.
      result_axes: for each result, the axis along which the microbatches' are concatenated, or
        None for their mean. The loss is the first.
      aux: the auxiliary output of a microbatch, as a pytree of types.
      dump: where the forms of the program are written.
    """

    options: Options
    plan: Plan
    costs: Costs
    timeline: Timeline
    stages: Stages
    gradients: tuple[StageGradient, ...]
    batch: tuple[BatchLeaf, ...]
    result_axes: tuple[int | None, ...]
    aux: Any
    dump: Dump

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
    """Plan a loss function and cut it into stages.

    Args:
      loss_fn: maps parameters and a batch to a scalar mean, or to (scalar, aux).
      params: pytree of `jax.ShapeDtypeStruct`.
      batch: pytree of `jax.ShapeDtypeStruct`, the whole batch.
      options: what the user chose.
      previous: the plan for other shapes, which is kept if the layers are the same.
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
    costs = estimate(count_work(graph), options.cluster.devices[0])
    layers = tuple(layer.name for layer in graph.layers)
    if previous is not None and previous.layers == layers:
        plan = previous
    else:
        plan = make_plan(layers, costs, options)
    dump.step("plan", plan.text())
    timeline = simulate(plan, costs)
    dump.step("timeline", timeline.text())
    stages = cut_stages(graph, plan.boundaries)
    dump.step("stages", stages.text())
    gradients = differentiate(stages)

    return Pipeline(
        options=options,
        plan=plan,
        costs=costs,
        timeline=timeline,
        stages=stages,
        gradients=gradients,
        batch=leaves,
        result_axes=(None, *_aux_axes(loss_fn, params, batch, aux, options)),
        aux=aux,
        dump=dump,
    )


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
    num_devices = len(options.devices)
    if isinstance(strategy, str) and strategy in FAMILIES:
        if num_devices > len(layers):
            raise ValueError(
                f"{len(layers)} layers cannot fill {num_devices} stages, one a device; pass "
                f"{len(layers)} devices or fewer (layers inside one scan, loop or checkpoint "
                "count as one)"
            )
        seconds = [cost.forward_s + cost.backward_s for cost in costs.layers]
        edges = balance(seconds, num_devices)
        stages = [tuple(layers[a:b]) for a, b in pairwise(edges)]
        rows = schedule(
            strategy, num_devices=num_devices, num_microbatches=options.num_microbatches
        )
        return Plan(
            stages=tuple(StagePlan(layers=s, device=d) for d, s in enumerate(stages)),
            schedule=rows,
        )
    plan = strategy if isinstance(strategy, Plan) else _load_plan(strategy)
    _check_plan(plan, layers, options)
    return plan


def _load_plan(strategy: str | PathLike[str]) -> Plan:
    try:
        return Plan.load(strategy)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"strategy {strategy!r} is neither a schedule ({', '.join(FAMILIES)}) nor the "
            "path of a plan file; change it, or write the file with plan.save(path)"
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
    kinds = {task.kind for row in plan.schedule for task in row}
    if kinds != {"F", "B"}:
        raise ValueError(
            f"the plan's tasks are of kinds {', '.join(sorted(kinds))}; training runs plans with "
            "F and B for every stage and microbatch"
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
