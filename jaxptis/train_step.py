"""A whole training step: gradients, and the optimizer's update where each parameter lives."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import optax
from flax import nnx

from jaxptis.adapt import Adaptation, adapt
from jaxptis.call import Call, Compiled, Training, make_on_devices
from jaxptis.executor import holdings
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.executable import Executable
from jaxptis.executor.record import Happening
from jaxptis.flax_models import split_nnx
from jaxptis.parts import flatten
from jaxptis.performance import Timeline
from jaxptis.placement import Placement
from jaxptis.profile import Profile, ProfileError, measured_timeline


class Bindable(Protocol):
    """What a training step needs of `jaxptis.pipelined.Pipelined`."""

    @property
    def compiler(self) -> Compiler: ...

    shown: Compiled | None

    def replace(self, old: Compiled, new: Compiled) -> None: ...

    def bind(
        self,
        graphdef: Any,
        params: Any,
        batch: Any,
        optimizer: optax.GradientTransformation | None = None,
    ) -> Call: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a training step maps to the next; a pytree.

    Attributes:
      step: how many steps were taken.
      params: the parameters, each leaf on the devices of the stages that read it. In place of a
        leaf of which the stages hold slices stands a `jaxptis.Parts`; `jaxptis.whole` returns the
        plain tree.
      opt_state: the optimizer's state, each leaf beside its parameter, and in the same parts.
      model_state: what an nnx model holds beside its parameters; None for other models.
      graphdef: the structure of an nnx model; None for other models.
    """

    step: int
    params: Any
    opt_state: Any
    model_state: Any = None
    graphdef: Any = None


jax.tree_util.register_dataclass(
    TrainState,
    data_fields=["step", "params", "opt_state", "model_state"],
    meta_fields=["graphdef"],
)


class TrainStep:
    """A whole training step: gradients, and the optimizer's update where each parameter lives."""

    def __init__(self, pipelined: Bindable, optimizer: optax.GradientTransformation) -> None:
        self._pipelined = pipelined
        self._optimizer = optimizer
        self._executable: Executable | None = None

    def init(self, params: Any, batch: Any) -> TrainState:
        """Return the first state, with copies of `params`; compiles the step.

        Args:
          params: as in `Pipelined.value_and_grad`. A leaf may also be any object with a shape, a
            dtype and `__array__`, such as a tensor in a file: it is read by the processes whose
            devices hold it, or a part of it, and dropped again before the next is read.
          batch: a batch, or the types of its leaves.
        """
        graphdef = model_state = None
        if isinstance(params, nnx.Module):
            graphdef, params, model_state = split_nnx(params)
        call = self.bind(graphdef, params, model_state, batch)
        params = jax.tree.unflatten(call.structure, call.compiled.copy(call.params))
        return self.start(graphdef, params, model_state, batch)

    def start(self, graphdef: Any, params: Any, model_state: Any, batch: Any) -> TrainState:
        """Return the first state around parameters that it may consume, already in place."""
        call = self.bind(graphdef, params, model_state, batch)
        training = self._training(call)
        if graphdef is not None:
            # Put in place once; what no stage reads stays where it is.
            leaves, structure = jax.tree.flatten(model_state)
            homes = holdings.batch_copies(call.compiled.pipeline).homes[: len(leaves)]
            placed = Placement(homes, self._pipelined.compiler.devices).put(leaves)
            kept = [old if new is None else new for old, new in zip(leaves, placed, strict=True)]
            model_state = jax.tree.unflatten(structure, kept)
        opt_state = make_on_devices(
            self._pipelined.compiler,
            self._optimizer.init,
            [params],
            training.copies.homes,
            training.cuts,
        )
        return TrainState(
            step=0,
            params=params,
            opt_state=jax.tree.unflatten(training.structure, opt_state),
            model_state=model_state,
            graphdef=graphdef,
        )

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take a step.

        Args:
          state: consumed: its arrays become those of the next state.
          batch: a pytree of arrays.

        Returns:
          The next state, and the metrics: "loss", and "aux" if the loss function has it.
        """
        return self._take(state, batch, _call_executable)

    def profile(self, state: TrainState, batch: Any, num_steps: int) -> tuple[TrainState, Profile]:
        """Take steps, every other of them recorded; see `jaxptis.Trainer.profile`."""
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; record 1 or more")
        compiler = self._pipelined.compiler
        timelines: list[tuple[Timeline, float]] = []
        plain_s: list[float] = []
        recorded_s: list[float] = []
        told: list[Callable[[], list[Happening]]] = []

        def record(executable: Executable, inputs: Sequence[Any]) -> list[Any]:
            outs, happenings = executable.record(inputs)
            told.append(happenings)
            return outs

        state, _ = self(state, batch)  # what only happens once is not recorded
        for _ in range(num_steps):
            for run, seconds in (_call_executable, plain_s), (record, recorded_s):
                jax.block_until_ready(state)
                start_s = time.perf_counter()
                state, _ = jax.block_until_ready(self._take(state, batch, run))
                seconds.append(time.perf_counter() - start_s)
            happenings = _agreed(told.pop(), compiler, state)
            timelines.append(measured_timeline(self._stepped(), compiler.devices, happenings))
        timeline, error_s = sorted(timelines, key=lambda each: each[0].step_s)[num_steps // 2]
        return state, Profile(
            timeline=timeline,
            recorded_s=tuple(recorded_s),
            plain_s=tuple(plain_s),
            clock_error_s=error_s,
        )

    def adapt(self, state: TrainState, batch: Any, num_steps: int) -> tuple[TrainState, Adaptation]:
        """Measure steps, and go on in the best order; see `jaxptis.Trainer.adapt`."""
        state, profile = self.profile(state, batch, num_steps)
        try:
            return state, self._adapt(state, batch, profile)
        except (ValueError, RuntimeError) as error:
            raise ProfileError(f"the order stays as it was: {error}", state) from error

    def _adapt(self, state: TrainState, batch: Any, profile: Profile) -> Adaptation:
        """Go on in the best order by a profile."""
        old = self.bind(state.graphdef, state.params, state.model_state, batch).compiled
        pipeline, adaptation = adapt(old.pipeline, old.train_step(self._optimizer).costs, profile)
        if not adaptation.is_new:
            return adaptation
        compiler = self._pipelined.compiler
        count = compiler.num_compilations
        new = old.adapted(pipeline, self._optimizer)
        self._pipelined.replace(old, new)
        self._pipelined.shown = new
        return dataclasses.replace(adaptation, num_compilations=compiler.num_compilations - count)

    def _take(
        self,
        state: TrainState,
        batch: Any,
        run: Callable[[Executable, Sequence[Any]], list[Any]],
    ) -> tuple[TrainState, dict[str, Any]]:
        """Take a step with `run`."""
        call = self.bind(state.graphdef, state.params, state.model_state, batch)
        training = self._training(call)
        self._executable = training.executable
        if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state.params)):
            raise ValueError(
                "the state was consumed by an earlier step; use the state that it returned"
            )
        old, structure = flatten(state.opt_state)
        if structure != training.structure:
            raise ValueError(
                f"the state is of another optimizer: its opt_state is {structure}, this step's "
                f"{training.structure}; use the step that made the state"
            )
        opt_buffers = training.state.buffers(training.state.put(training.cuts.cut(old)))
        inputs = [*call.params_buffers(), *opt_buffers, *call.batch_buffers()]
        outs = run(training.executable, inputs)
        value, outs = call.split(outs)
        num_params = len(outs) - len(opt_buffers)
        params = call.compiled.params.arrays(outs[:num_params])
        opt_state = training.state.arrays(outs[num_params:])
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=jax.tree.unflatten(call.structure, call.compiled.cuts.join(params)),
            opt_state=jax.tree.unflatten(structure, training.cuts.join(opt_state)),
        )
        return new, _metrics(value, call.has_aux)

    def evaluate(self, state: TrainState, batch: Any) -> dict[str, Any]:
        """Return the metrics of a batch, by the forward alone."""
        graphdef, model_state = state.graphdef, state.model_state
        call = self._pipelined.bind(graphdef, state.params, _beside(graphdef, model_state, batch))
        outs = call.compiled.evaluation([*call.params_buffers(), *call.batch_buffers()])
        return _metrics(call.split(outs)[0], call.has_aux)

    @property
    def num_tasks(self) -> int:
        """Tasks of this process in a step, of the shapes stepped last."""
        return self._stepped().num_tasks

    @property
    def host_s_per_task(self) -> float:
        """Seconds the host took to issue a task and what belongs to it, on average.

        Transfers and the update are included, placing the batch is not.
        """
        executable = self._stepped()
        return executable.host_s / (executable.num_calls * executable.num_tasks)

    def _stepped(self) -> Executable:
        if self._executable is None:
            raise ValueError("no step was taken yet; call step first")
        return self._executable

    def _training(self, call: Call) -> Training:
        """Return the compiled step for a call, the one used last from now on."""
        training = call.compiled.train_step(self._optimizer)
        self._pipelined.shown, call.compiled.used = call.compiled, training
        return training

    def bind(self, graphdef: Any, params: Any, model_state: Any, batch: Any) -> Call:
        """Return the call of a step with these arguments; see `Pipelined.bind`."""
        batch = _beside(graphdef, model_state, batch)
        return self._pipelined.bind(graphdef, params, batch, self._optimizer)


def _agreed(
    told: Callable[[], list[Happening]], compiler: Compiler, state: TrainState
) -> list[Happening]:
    """Return what happened in this process, or raise in all if one cannot tell."""
    happenings, error = [], ""
    try:
        happenings = told()
    except ValueError as cannot:
        error = str(cannot)
    if errors := list(filter(None, compiler.processes.share(error))):
        raise ProfileError(errors[0], state)
    return happenings


def _beside(graphdef: Any, model_state: Any, batch: Any) -> Any:
    """Return the batch, of an nnx model with its variables beside the parameters."""
    return batch if graphdef is None else (model_state, batch)


def _call_executable(executable: Executable, inputs: Sequence[Any]) -> list[Any]:
    return executable(inputs)


def _metrics(value: Any, has_aux: bool) -> dict[str, Any]:
    """Name what a loss function returns."""
    return {"loss": value[0], "aux": value[1]} if has_aux else {"loss": value}
