"""What every layer runs if it is a stage of its own: what is counted, or measured, to cost it.

Layers with equal programs, such as those of equal blocks, are of one kind, and a kind is made once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from passes import STAGE_PASSES, jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate_stage
from passes.layers import LayerGraph
from passes.runner import Dump, run
from passes.split_backward import SplitBackward, split_backward
from passes.stages import (
    Operand,
    Role,
    Stage,
    StageGradient,
    StageProgram,
    Stages,
    slice_program,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The programs of equal layers for one microbatch.

    Attributes:
      index: of the first of these layers, whose operands those of the programs are; of several
        models that are numbered together, one that no other kind has.
      gradient: the forward and the whole backward; what is cheap is recomputed.
      split: the backward in two parts.
      again: what of the forward a stage that recomputes all runs once more; None if nothing.
      saved_all_bytes: what the forward saves if nothing is recomputed.
    """

    index: int
    gradient: StageGradient
    split: SplitBackward
    again: StageProgram | None
    saved_all_bytes: int

    @property
    def programs(self) -> dict[str, StageProgram]:
        """The programs that have something to do: by kind of task, and "again"."""
        backward = self.gradient.backward
        named = {
            "F": self.gradient.forward,
            "B": backward if backward.writes else None,
            "I": self.split.input_grad,
            "W": self.split.weight_grad,
            "again": self.again,
        }
        return {name: program for name, program in named.items() if program is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPrograms:
    """A layer as a stage of its own.

    Attributes:
      name: of the layer.
      params: the types of the parameters that it holds, by index.
      kind: its programs.
      operands: its own constants, parameters, batch, crossings and results, by those of the kind.
      skipping_bytes: of what layers after it read of those before, but not it; without scalars.
    """

    name: str
    params: Mapping[int, jax.ShapeDtypeStruct]
    kind: LayerKind
    operands: Mapping[Operand, Operand]
    skipping_bytes: int


def layer_programs(graph: LayerGraph) -> tuple[LayerPrograms, ...]:
    """Cut and differentiate each layer; where text tells that layers are equal, one of them."""
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    stages = run(stages, STAGE_PASSES, Dump(None))
    types = jaxprs.avals(graph.program.param_vars)
    found: dict[Any, tuple[LayerKind, StageGradient]] = {}
    kinds: dict[Any, LayerKind] = {}
    layers = []
    for index, (layer, stage) in enumerate(zip(graph.layers, stages.stages, strict=True)):
        before = _before_gradient(stages, index)
        if before not in found:
            gradient = differentiate_stage(stages, index, recompute="cheap")
            after = _form(gradient.forward), _form(gradient.backward)
            if after not in kinds:
                kinds[after] = _make_kind(stages, index, gradient)
            found[before] = kinds[after], gradient
        kind, gradient = found[before]
        layers.append(
            LayerPrograms(
                name=layer.name,
                params={p: types[p] for p in stage.params},
                kind=kind,
                operands=_operands(kind, gradient, stage),
                skipping_bytes=skipping_bytes(stages, index),
            )
        )
    return tuple(layers)


def skipping_bytes(stages: Stages, stage: int) -> int:
    """Return how much of what later stages read goes past a stage that does not.

    Without scalars: where they are summed does not make layers another kind.
    """
    return jaxprs.nbytes(
        c.aval
        for c in stages.crossings
        if c.producer < stage < c.consumers[-1] and stage not in c.consumers and c.aval.shape
    )


def number_together(models: Sequence[Sequence[LayerPrograms]]) -> list[list[LayerPrograms]]:
    """Return the layers of several models, whose equal kinds are one, with an index of its own.

    Kinds are equal if the text of their gradients is. Two traces of one layer may differ in it, as
    those of Mamba and of experts did on a GPU: then there are two kinds where one would do.
    """
    kinds: dict[Any, LayerKind] = {}

    def numbered(kind: LayerKind) -> LayerKind:
        form = _form(kind.gradient.forward), _form(kind.gradient.backward)
        return kinds.setdefault(form, dataclasses.replace(kind, index=len(kinds)))

    found = []
    for layers in models:
        own = {layer.kind.index: layer.kind for layer in layers}
        own = {index: numbered(kind) for index, kind in own.items()}
        found.append([dataclasses.replace(x, kind=own[x.kind.index]) for x in layers])
    return found


def _operands(kind: LayerKind, gradient: StageGradient, stage: Stage) -> dict[Operand, Operand]:
    """Return what the operands of a kind are in a stage with the same gradient as another."""
    own = _pairs(gradient.stage.program(), stage.program())
    same = _pairs(kind.gradient.forward, gradient.forward)
    same |= _pairs(kind.gradient.backward, gradient.backward)
    return {operand: own[other] for operand, other in same.items() if other in own}


def _pairs(one: StageProgram, other: StageProgram) -> dict[Operand, Operand]:
    return dict(zip((*one.reads, *one.writes), (*other.reads, *other.writes), strict=True))


def _before_gradient(stages: Stages, index: int) -> Any:
    """Return what two layers with equal gradients have in common, found without a gradient."""
    stage, crossings = stages.stages[index], stages.crossings
    return (
        _form(stage.program()),
        tuple(crossings[c].has_gradient for c in stage.inputs),
        tuple((crossings[c].has_gradient, len(crossings[c].consumers)) for c in stage.outputs),
        stage.makes_loss,
        tuple(id(eqn) for eqn in jaxprs.equations(stage.forward) if jaxprs.hides_functions(eqn)),
    )


def _form(program: StageProgram) -> tuple[str, tuple[Role, ...]]:
    """Return what is the same in equal programs on other operands."""
    return str(program.jaxpr), tuple(x.role for x in (*program.reads, *program.writes))


def _make_kind(stages: Stages, index: int, gradient: StageGradient) -> LayerKind:
    without = differentiate_stage(stages, index, recompute="none")
    return LayerKind(
        index=index,
        gradient=gradient,
        split=split_backward(gradient.backward),
        again=_again(gradient),
        saved_all_bytes=jaxprs.nbytes(without.forward.avals_of(Role.SAVED)),
    )


def _again(gradient: StageGradient) -> StageProgram | None:
    """Return the part of the forward that makes what the backward reads of it."""
    forward, read = gradient.forward, set(gradient.backward.reads)
    written = zip(forward.writes, forward.jaxpr.outvars, strict=True)
    wanted = [(operand, v) for operand, v in written if operand in read]
    if not wanted:
        return None
    given = dict(zip(forward.jaxpr.invars, forward.reads, strict=True))
    return slice_program(forward.jaxpr, given, wanted)
