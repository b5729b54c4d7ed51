"""The IR after the cut: one forward program a stage, and the values that cross between them."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from passes import jaxprs
from passes.jaxprs import Jaxpr, Literal, Var
from passes.program import Program

LOSS = 0  # among the results of a program; the leaves of the auxiliary output follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossing:
    """An activation that later stages read.

    Attributes:
      producer: the stage that computes it.
      consumers: the stages that read it, ascending; after `hand_on` the next one alone.
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

    def program(self) -> "StageProgram":
        """Return the forward with the roles of its inputs and results."""
        return StageProgram(
            jaxpr=self.forward,
            reads=(
                *(Operand(Role.CONSTANT, k) for k in range(len(self.constants))),
                *(Operand(Role.PARAM, p) for p in self.params),
                *(Operand(Role.BATCH, i) for i in self.batch),
                *(Operand(Role.CROSSING, c) for c in self.inputs),
            ),
            writes=(
                *(Operand(Role.CROSSING, c) for c in self.outputs),
                *(Operand(Role.RESULT, r) for r in self.results),
            ),
        )


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


class Role(enum.Enum):
    """What a program of a stage reads or writes; the index says which."""

    CONSTANT = enum.auto()  # of the stage's gradient, or of the stage
    PARAM = enum.auto()  # of the whole program
    BATCH = enum.auto()  # of the whole program
    CROSSING = enum.auto()
    RESULT = enum.auto()  # LOSS, then the leaves of the auxiliary output
    SAVED = enum.auto()  # from the forward to the backward
    COTANGENT = enum.auto()  # of a crossing, as one of its consumers sees it
    D_LOSS = enum.auto()
    KEPT = enum.auto()  # from the input gradient to the weight gradient
    SUM = enum.auto()  # of the gradients of a parameter so far


@dataclasses.dataclass(frozen=True)
class Operand:
    """A value that a program of a stage reads or writes; `consumer` only for a cotangent."""

    role: Role
    index: int = 0
    consumer: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageProgram:
    """A jaxpr, what its inputs are, and what its results are."""

    jaxpr: Jaxpr
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]

    def __post_init__(self) -> None:
        assert len(self.reads) == len(self.jaxpr.invars), self.reads
        assert len(self.writes) == len(self.jaxpr.outvars), self.writes

    def avals_of(self, role: Role) -> list[Any]:
        """Return the types of what is written in a role."""
        written = zip(self.writes, jaxprs.avals(self.jaxpr.outvars), strict=True)
        return [aval for operand, aval in written if operand.role == role]


def slice_program(
    jaxpr: Jaxpr, available: Mapping[Var, Operand], wanted: Sequence[tuple[Operand, Var | Literal]]
) -> StageProgram:
    """Return the part of `jaxpr` that computes `wanted`, with those inputs that it reads."""
    body = jaxprs.backward_slice(jaxpr, invars=list(available), outvars=[v for _, v in wanted])
    live = jaxprs.read_vars(body)
    reads = {v: operand for v, operand in available.items() if v in live}
    return StageProgram(
        jaxpr=jaxprs.rebuild(body, invars=list(reads)),
        reads=tuple(reads.values()),
        writes=tuple(operand for operand, _ in wanted),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageGradient:
    """A stage's forward that saves what its backward needs, and that backward.

    Attributes:
      stage: what was differentiated.
      constants: those of the stage and any that differentiation added.
      forward: writes outputs, results and saved values.
      backward: writes the cotangents of the inputs, and the sums of the gradients so far with
        those of this microbatch added; a parameter without a gradient has none.
    """

    stage: Stage
    constants: tuple[Any, ...]
    forward: StageProgram
    backward: StageProgram
