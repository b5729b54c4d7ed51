"""From what the programs of layers take to the costs of the layers."""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxptis.performance.costs import Costs, LayerCost, TiedParams
from passes import jaxprs
from passes.differentiate import accumulator_dtype
from passes.layer_programs import LayerKind, LayerPrograms
from passes.split_backward import held_for_kept_bytes, held_for_weights
from passes.stages import Operand, Role, StageProgram

Track = Callable[[Sequence[Any]], Iterable[Any]]
"""Goes through layers, kinds or programs, and may show how far it is; `iter` shows nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindCost:
    """What the programs of a kind of layer take.

    Attributes:
        seconds: by the name of the program; see `LayerKind.programs`.
        temporary_bytes: what each needs beside its inputs and results, by its name.
        spread: the largest interquartile range over the median, if they were measured.
    """

    seconds: Mapping[str, float]
    temporary_bytes: Mapping[str, int]
    spread: float = 0.0


def kinds_of(layers: Sequence[LayerPrograms]) -> list[LayerKind]:
    """Return each kind of layer once."""
    return list({layer.kind.index: layer.kind for layer in layers}.values())


def layer_costs(
    layers: Sequence[LayerPrograms], costs: Mapping[int, KindCost], state_bytes: Mapping[int, int]
) -> tuple[LayerCost, ...]:
    """Return the costs of layers.

    Args:
        layers: what they run.
        costs: of each kind, by its index.
        state_bytes: the optimizer's state of each parameter; none where it has none.
    """
    readers = _readers(layers)
    return tuple(
        _layer_cost(
            layer,
            costs[layer.kind.index],
            [p for p in layer.params if len(readers[p]) == 1],
            state_bytes,
        )
        for layer in layers
    )


def tied_params(
    layers: Sequence[LayerPrograms], state_bytes: Mapping[int, int]
) -> tuple[TiedParams, ...]:
    """Return the parameters that several layers read, those of the same layers together."""
    readers = _readers(layers)
    shared: dict[tuple[int, ...], list[int]] = {}
    for p, where in readers.items():
        if len(where) > 1:
            shared.setdefault(where, []).append(p)
    return tuple(
        TiedParams(
            layers=tuple(layers[index].name for index in where),
            **_param_bytes(layers[where[0]], params, state_bytes),
        )
        for where, params in sorted(shared.items())
    )


def _readers(layers: Sequence[LayerPrograms]) -> dict[int, tuple[int, ...]]:
    """Return, for each parameter, the indices of the layers that hold it."""
    readers: dict[int, tuple[int, ...]] = {}
    for index, layer in enumerate(layers):
        for p in layer.params:
            readers[p] = (*readers.get(p, ()), index)
    return readers


def with_state_bytes(
    costs: Costs, held: Sequence[Collection[int]], state_bytes: Mapping[int, int]
) -> Costs:
    """Return costs of which the optimizer's state is this.

    Args:
        costs: of layers.
        held: the indices of the parameters of each layer.
        state_bytes: of each parameter.
    """
    state: defaultdict[tuple[str, ...], int] = defaultdict(int)
    first = (costs.layers[0].name,)  # holds what no layer reads
    for p, num_bytes in state_bytes.items():
        pairs = zip(costs.layers, held, strict=True)
        readers = tuple(layer.name for layer, params in pairs if p in params)
        state[readers or first] += num_bytes
    layers = (
        dataclasses.replace(layer, state_bytes=state[(layer.name,)]) for layer in costs.layers
    )
    names = [layer.name for layer in costs.layers]
    tied = (
        dataclasses.replace(each, state_bytes=state[tuple(sorted(each.layers, key=names.index))])
        for each in costs.tied
    )
    return dataclasses.replace(costs, layers=tuple(layers), tied=tuple(tied))


def _layer_cost(
    layer: LayerPrograms, cost: KindCost, own: Collection[int], state_bytes: Mapping[int, int]
) -> LayerCost:
    seconds = {name: cost.seconds.get(name, 0.0) for name in ("F", "B", "I", "W", "again")}
    temporary_bytes = {name: cost.temporary_bytes.get(name, 0) for name in ("F", "B", "I", "W")}
    return LayerCost(
        name=layer.name,
        forward_s=seconds["F"],
        backward_s=seconds["B"],
        input_grad_s=seconds["I"],
        weight_grad_s=seconds["W"],
        recompute_s=seconds["again"],
        **_activation_bytes(layer.kind),
        skipping_bytes=layer.skipping_bytes,
        **_param_bytes(layer, own, state_bytes),
        forward_temporary_bytes=temporary_bytes["F"],
        backward_temporary_bytes=temporary_bytes["B"],
        input_grad_temporary_bytes=temporary_bytes["I"],
        weight_grad_temporary_bytes=temporary_bytes["W"],
        spread=cost.spread,
    )


def _activation_bytes(kind: LayerKind) -> dict[str, int]:
    """Return what of a microbatch lasts between the tasks of a layer."""
    stage = kind.gradient.stage
    inputs = {Operand(Role.CROSSING, c) for c in stage.inputs}
    input_bytes = _read_bytes(stage.program(), lambda x: x in inputs)
    lasting = _read_bytes(kind.gradient.backward, lambda x: x in inputs or x.role == Role.SAVED)
    weight_grad = kind.split.weight_grad
    from_input_grad = (Role.SAVED, Role.KEPT, Role.COTANGENT)
    return {
        "input_bytes": input_bytes,
        # Of an input that the backward does not read, something else lasts in the same memory.
        "saved_bytes": max(0, lasting - input_bytes),
        "saved_all_bytes": kind.saved_all_bytes,
        "kept_bytes": 0
        if weight_grad is None
        else _read_bytes(weight_grad, lambda x: x in inputs or x.role in from_input_grad),
        "made_bytes": _made_bytes(kind),
        "backward_held_bytes": jaxprs.nbytes(
            v.aval for v in held_for_weights(kind.gradient.backward)
        ),
        "input_grad_held_bytes": held_for_kept_bytes(kind.split),
    }


def _made_bytes(kind: LayerKind) -> int:
    """Return what I makes, but for that which takes the memory of what nothing reads after it."""
    first, second = kind.split.input_grad, kind.split.weight_grad
    if first is None or second is None:
        return 0
    over = [
        v.aval
        for x, v in zip(first.reads, first.jaxpr.invars, strict=True)
        if x.role in (Role.CROSSING, Role.SAVED, Role.COTANGENT) and x not in second.reads
    ]
    made = _by_type(jaxprs.avals(first.jaxpr.outvars)) - _by_type(over)
    return sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in made.items())


def _by_type(avals: Iterable[Any]) -> Counter[tuple[tuple[int, ...], Any]]:
    return Counter((tuple(each.shape), each.dtype) for each in avals)


def _read_bytes(program: StageProgram, wanted: Callable[[Operand], bool]) -> int:
    read = zip(program.reads, program.jaxpr.invars, strict=True)
    return jaxprs.nbytes(v.aval for operand, v in read if wanted(operand))


def _param_bytes(
    layer: LayerPrograms, params: Collection[int], state_bytes: Mapping[int, int]
) -> dict[str, int]:
    """Return what lasts of these parameters of a layer."""
    types = [layer.params[p] for p in params]
    return {
        "param_bytes": jaxprs.nbytes(types),
        "grad_bytes": sum(a.size * accumulator_dtype(a.dtype).itemsize for a in types),
        "state_bytes": sum(state_bytes.get(p, 0) for p in params),
    }
