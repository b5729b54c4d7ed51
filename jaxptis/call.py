"""What is compiled for arguments of given types, and a call with such arguments."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from jaxptis.compile import Pipeline
from jaxptis.executor import holdings, steps
from jaxptis.executor.compiled import CompiledProgram, Compiler
from jaxptis.executor.draft import Copies, Homes
from jaxptis.executor.executable import Executable
from jaxptis.executor.initializer import initializer
from jaxptis.executor.memory import DeviceMemory
from jaxptis.executor.stage_tasks import KINDS, stage_program_name
from jaxptis.parts import Cuts, flatten, is_parts
from jaxptis.performance import Costs, Timeline, check_memory
from jaxptis.performance.check_memory import fits_memory
from jaxptis.performance.memory_curves import memory_curves
from jaxptis.placement import Placement, aval_of
from passes.boxes import Pieces, sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStage:
    """The compiled programs of a stage, for inspection.

    The plan says which it has: the whole backward, its two parts, or both for different
    microbatches. A part that has nothing to do is None, too.
    """

    layers: tuple[str, ...]
    device: int
    forward: CompiledProgram
    backward: CompiledProgram | None
    input_grad: CompiledProgram | None
    weight_grad: CompiledProgram | None

    @property
    def programs(self) -> dict[str, CompiledProgram]:
        """Those that it has, by kind of task: F, B, I, W."""
        named = {"F": self.forward, "B": self.backward, "I": self.input_grad, "W": self.weight_grad}
        return {kind: program for kind, program in named.items() if program is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A training step, and its optimizer's state.

    Attributes:
      executable: the step.
      copies: the parts of the state, and the devices of each.
      state: where these are put.
      cuts: into which parts the leaves are cut.
      structure: of the state as a pytree, with one leaf for all parts of one.
      costs: of the layers, with their parts of the state.
    """

    executable: Executable
    copies: Copies
    state: Placement
    cuts: Cuts
    structure: Any
    costs: Costs


@dataclasses.dataclass(frozen=True)
class GradientStep:
    """The gradient, and where that of each leaf of the parameters is put."""

    executable: Executable
    placement: Placement


class Compiled:
    """A loss function at given shapes: its pipeline, and the steps built so far."""

    def __init__(self, pipeline: Pipeline, compiler: Compiler) -> None:
        """Take what is planned; steps are built when asked for."""
        self.pipeline = pipeline
        self.params = Placement(pipeline.homes, compiler.devices)
        program = pipeline.stages.program
        self.cuts = Cuts(program.pieces, [aval.shape for aval in program.leaf_avals])
        self.batch = Placement(holdings.batch_copies(pipeline).homes, compiler.devices)
        self.results = Placement(holdings.result_homes(pipeline, compiler), compiler.devices)
        self._compiler = compiler
        self._training: dict[optax.GradientTransformation, Training] = {}
        self.used: Training | None = None  # None: the gradient

    def adapted(self, pipeline: Pipeline, optimizer: optax.GradientTransformation) -> "Compiled":
        """Return the same in another order: for a pipeline with these stages on these devices.

        Its training step runs the programs of this one's, so nothing is compiled. If there is an
        evaluation, it stays as it is.

        Raises:
          ValueError: the order needs other programs.
        """
        adapted = Compiled(pipeline, self._compiler)
        if "evaluation" in vars(self):
            adapted.evaluation = self.evaluation
        adapted.used = adapted._add_training(optimizer, self.train_step(optimizer).executable)
        return adapted

    @functools.cached_property
    def evaluation(self) -> Executable:
        """The forward alone."""
        return steps.evaluation(self.pipeline, self._compiler)

    @functools.cached_property
    def gradient_step(self) -> GradientStep:
        """The gradient."""
        check_memory(self.pipeline.timeline, self.pipeline.analysis.cluster)
        executable, homes = steps.gradient_step(self.pipeline, self._compiler)
        return GradientStep(self._dumped(executable), Placement(homes, self._compiler.devices))

    @property
    def trains(self) -> bool:
        """Whether a training step is built."""
        return bool(self._training)

    def fits(self, optimizer: optax.GradientTransformation) -> bool:
        """Whether the devices have the memory for a training step."""
        analysis = self.pipeline.analysis
        return optimizer in self._training or fits_memory(
            self._predicted(analysis.costs_with(optimizer)), analysis.cluster
        )

    def train_step(self, optimizer: optax.GradientTransformation) -> Training:
        """Return the gradient and the optimizer's update.

        Raises:
          ValueError: a device has too little memory for the step.
        """
        return self._training.get(optimizer) or self._add_training(optimizer)

    def _add_training(
        self, optimizer: optax.GradientTransformation, like: Executable | None = None
    ) -> Training:
        analysis = self.pipeline.analysis
        costs = analysis.costs_with(optimizer)
        check_memory(self._predicted(costs), analysis.cluster)
        executable, state, pieces = steps.train_step(
            self.pipeline, self._compiler, optimizer, analysis.params, like=like
        )
        types, structure = jax.tree.flatten(jax.eval_shape(optimizer.init, analysis.params))
        training = self._training[optimizer] = Training(
            executable=self._dumped(executable),
            copies=state,
            state=Placement(state.homes, self._compiler.devices),
            cuts=Cuts(pieces, [aval.shape for aval in types]),
            structure=structure,
            costs=costs,
        )
        return training

    @property
    def costs(self) -> Costs:
        """What the layers cost in the step used last."""
        return self.pipeline.analysis.costs if self.used is None else self.used.costs

    @property
    def timeline(self) -> Timeline:
        """The predicted step, of the step used last."""
        return self.pipeline.timeline if self.used is None else self._predicted(self.costs)

    def _predicted(self, costs: Costs) -> Timeline:
        """Return the predicted step with the memory that these costs say."""
        predicted = self.pipeline.timeline
        rows, transfers = predicted.spans, predicted.transfers
        memory = memory_curves(self.pipeline.plan, costs, rows, transfers)
        return dataclasses.replace(predicted, memory=memory)

    def copy(self, params: Sequence[Any]) -> list[Any]:
        """Return copies of the leaves of the parameters in place, made one after the other."""
        homes, copies = iter(self.pipeline.homes), []
        for leaf, pieces in zip(params, self.cuts.pieces, strict=True):
            copies += self._copy(leaf, pieces, list(itertools.islice(homes, len(pieces))))
            gc.collect(0)  # until when JAX keeps the NumPy arrays that it has copied
        return self.cuts.join(copies)

    def _copy(self, leaf: Any, pieces: Pieces, homes: Sequence[Homes]) -> list[Any]:
        """Return copies of the parts of a leaf; what it is read into on the host is then free."""
        placement = Placement(homes, self._compiler.devices)
        aval = aval_of(leaf)
        if placement.is_local:
            parts = Cuts([pieces], [aval.shape]).cut([leaf])
        else:  # of other processes: its parts need no values here
            parts = [jax.ShapeDtypeStruct(sizes(box), aval.dtype) for box in pieces]
        return jax.block_until_ready(placement.put(parts, copy=True))

    def memory(self) -> tuple[DeviceMemory, ...]:
        """Return the memory of the step used last, from its instructions; all of them count."""
        predicted = holdings.predicted_memory(
            self.pipeline, *([] if self.used is None else [self.used.copies])
        )
        accounts = (self.used or self.gradient_step).executable.accounts
        return tuple(
            dataclasses.replace(
                device,
                peak_bytes=account.peak_bytes,
                temporary_bytes=account.peak_temporary_bytes,
            )
            for device, account in zip(predicted, accounts, strict=True)
        )

    def stages(self) -> tuple[CompiledStage, ...]:
        """Return the stages of the step used last."""
        return self._stages((self.used or self.gradient_step).executable.programs)

    def uncompiled_stages(self) -> tuple[CompiledStage, ...]:
        """Return the stages, each of whose programs is compiled when it is looked at."""
        return self._stages(steps.stage_programs(self.pipeline, self._compiler))

    def _stages(self, programs: Mapping[str, CompiledProgram]) -> tuple[CompiledStage, ...]:
        return tuple(
            CompiledStage(
                layers=stage.layers,
                device=stage.device,
                forward=programs[stage_program_name(i, "F")],
                backward=programs.get(stage_program_name(i, "B")),
                input_grad=programs.get(stage_program_name(i, "I")),
                weight_grad=programs.get(stage_program_name(i, "W")),
            )
            for i, stage in enumerate(self.pipeline.plan.stages)
        )

    def _dumped(self, executable: Executable) -> Executable:
        """Write the instructions and the HLO of the stages, if they are wanted, and return it."""
        dump = self.pipeline.analysis.dump
        if dump.enabled:
            dump.step("instructions", executable.rows.text())
            for stage, kind in self.pipeline.programs:
                program = executable.programs[stage_program_name(stage, kind)]
                if not self._compiler.is_local(program.spec.device):
                    continue  # its own process writes it
                dump.file(f"stage{stage:02d}.{KINDS[kind]}.hlo", program.as_text("hlo"))
        return executable


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a call, and what is compiled for their types.

    Attributes:
      compiled: the steps for these types.
      structure: of the parameters.
      params: the leaves of the parameters; some may be in parts.
      batch: the leaves of the batch.
    """

    compiled: Compiled
    structure: Any
    params: list[Any]
    batch: list[Any]

    @property
    def has_aux(self) -> bool:
        return self.compiled.pipeline.analysis.options.has_aux

    def params_buffers(self) -> list[Any]:
        """Return the copies of the parameters, put in place where they are not."""
        parts = self.compiled.cuts.cut(self.params)
        return self.compiled.params.buffers(self.compiled.params.put(parts))

    def like_params(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves of a gradient; in parts, and in place, those of parameters in parts."""
        if not any(map(is_parts, self.params)):
            return list(leaves)
        cut = self.compiled.cuts.join(self.compiled.params.put(self.compiled.cuts.cut(leaves)))
        return [
            part if is_parts(param) else leaf
            for leaf, part, param in zip(leaves, cut, self.params, strict=True)
        ]

    def batch_buffers(self) -> list[Any]:
        """Return the copies of the batch, put in place where they are not."""
        return self.compiled.batch.buffers(self.compiled.batch.put(self.batch))

    def split(self, outs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return, of a step's outputs, what the loss function returns, and those behind it."""
        results = self.compiled.results
        count = results.num_copies
        loss, *aux = results.arrays(outs[:count])
        structure = jax.tree.structure(self.compiled.pipeline.analysis.aux)
        value = (loss, jax.tree.unflatten(structure, aux))
        return value if self.has_aux else loss, list(outs[count:])


def make_on_devices(
    compiler: Compiler,
    fun: Callable[..., Any],
    args: Sequence[Any],
    homes: Sequence[Homes],
    cuts: Cuts,
) -> list[Any]:
    """Return the leaves of `fun(*args)`, cut, each part computed on its homes.

    Args:
      compiler: for the devices.
      fun: returns a pytree of arrays.
      args: pytrees; some leaves may be in parts.
      homes: of each part of the result.
      cuts: into which parts the leaves of the result are cut.
    """
    leaves, structure = flatten(list(args))
    types = jax.tree.unflatten(structure, map(aval_of, leaves))
    given = Cuts.of(leaves)
    executable, needed = initializer(
        compiler, fun, types, homes, given=given.pieces, wanted=cuts.pieces
    )
    placement = Placement(needed, compiler.devices)
    buffers = executable(placement.buffers(placement.put(given.cut(leaves))))
    return cuts.join(Placement(homes, compiler.devices).arrays(buffers))
