"""The IR after the cut: one forward program a stage, and the values that cross between them."""

import dataclasses
from typing import Any

from passes import jaxprs
from passes.jaxprs import Jaxpr
from passes.program import Program

LOSS = 0  # among the results of a program; the leaves of the auxiliary output follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossing:
    """An activation that later stages read.

    Attributes:
      producer: the stage that computes it.
      consumers: the stages that read it, ascending; it is sent to each of them.
      aval: its shape and dtype.
      has_gradient: whether the loss has a gradient with respect to what the consumers read.
    """

    producer: int
    consumers: tuple[int, ...]
    aval: Any
    has_gradient: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of layers as a program of its own.

    Attributes:
      forward: (constants, params, batch, inputs) -> (outputs, results).
      constants: values of the closed-over arrays that it reads.
      params: indices, in the whole program, of the parameters that live here.
      batch: indices of the batch leaves that it reads.
      inputs: indices of the crossings that it reads.
      outputs: indices of the crossings that it makes.
      results: indices of the results of the whole program (LOSS, then auxiliary leaves).
    """

    forward: Jaxpr
    constants: tuple[Any, ...]
    params: tuple[int, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def makes_loss(self) -> bool:
        return LOSS in self.results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """A program cut into stages; consecutive stages hold consecutive layers."""

    program: Program
    crossings: tuple[Crossing, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise unless every parameter has a stage, every result one, and all types agree."""
        held = {p for stage in self.stages for p in stage.params}
        assert held == set(range(len(self.program.params))), "a parameter has no stage"
        results = sorted(r for stage in self.stages for r in stage.results)
        assert results == list(range(len(self.program.jaxpr.outvars))), results
        for s, stage in enumerate(self.stages):
            jaxprs.check(stage.forward)
            assert all(s in self.crossings[c].consumers for c in stage.inputs)
            assert all(s == self.crossings[c].producer for c in stage.outputs)
            outs = [self.crossings[c].aval for c in stage.outputs]
            got = jaxprs.avals(stage.forward.outvars[: len(outs)])
            assert [(a.shape, a.dtype) for a in outs] == [(a.shape, a.dtype) for a in got]

    def text(self) -> str:
        """Return the crossings, a line each, and the forward jaxpr of every stage."""
        lines = [
            f"{c.aval.str_short()}: stage {c.producer} -> {', '.join(map(str, c.consumers))}"
            for c in self.crossings
        ]
        for s, stage in enumerate(self.stages):
            held = ", ".join(self.program.params[p] for p in stage.params)
            lines += ["", f"stage {s}: {held or 'no parameter'}", str(stage.forward)]
        return "\n".join([*lines, ""])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cotangent:
    """The gradient of a crossing, as one of its consumers sees it."""

    crossing: int
    consumer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageGradient:
    """A stage's forward that saves what its backward needs, and that backward.

    Attributes:
      stage: what was differentiated.
      forward: (constants, params, batch, inputs) -> (outputs, results, saved).
      backward: (constants, params, batch, kept inputs, kept outputs, saved, d_outputs, [d_loss],
        accumulated) -> (d_inputs, accumulated); d_loss only where the stage makes the loss. The
        gradients of the parameters are added to `accumulated`, one array a parameter of the stage.
      constants: those of the stage and any that differentiation added.
      kept_inputs: positions, in `stage.inputs`, of those that the backward reads.
      kept_outputs: positions, in `stage.outputs`, of those that the backward reads.
      d_outputs: the cotangents that the backward takes, in order.
      d_inputs: the cotangents that it returns, in order.
    """

    stage: Stage
    forward: Jaxpr
    backward: Jaxpr
    constants: tuple[Any, ...]
    kept_inputs: tuple[int, ...]
    kept_outputs: tuple[int, ...]
    d_outputs: tuple[Cotangent, ...]
    d_inputs: tuple[Cotangent, ...]

    @property
    def num_saved(self) -> int:
        visible = len(self.stage.outputs) + len(self.stage.results)
        return len(self.forward.outvars) - visible
