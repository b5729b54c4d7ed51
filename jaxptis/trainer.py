"""A Flax model, its loss and its optimizer as a pipeline that trains."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxptis.adapt import Adaptation
from jaxptis.call import CompiledStage, make_on_devices
from jaxptis.executor.memory import DeviceMemory
from jaxptis.flax_models import Recipe
from jaxptis.parts import is_parts
from jaxptis.performance import Costs, Timeline
from jaxptis.pipelined import Pipelined
from jaxptis.plan import Plan
from jaxptis.profile import Profile
from jaxptis.train_step import TrainState, TrainStep

NUM_SHOWN = 10  # of what is wrong with parameters


class Trainer:
    """Trains a model; the `trainer` of a decorated Flax module makes it."""

    def __init__(
        self,
        pipelined: Pipelined,
        optimizer: optax.GradientTransformation,
        model: Recipe | nnx.Module,
    ) -> None:
        """Take a recipe that makes the model's parameters, or an nnx model that has them."""
        self._pipelined = pipelined
        self._step = TrainStep(pipelined, optimizer)
        self._model = model

    def init(self, key: jax.Array | None, batch: Any) -> TrainState:
        """Plan and compile for batches like `batch`, and return the first state.

        Every parameter, and its part of the optimizer's state, is made on its own devices.

        Args:
          key: a JAX random key; None for a trainer of an nnx model, which has its parameters.
          batch: a pytree of arrays.

        Raises:
          ValueError: the key is missing, or the model has parameters already.
        """
        if isinstance(self._model, nnx.Module):
            if key is not None:
                raise ValueError(
                    "this trainer was made from a model that has its parameters; call "
                    "init(None, batch), or make the trainer from the class to draw new ones"
                )
            return self._step.init(self._model, batch)
        if key is None:
            raise ValueError("the parameters are drawn with a key; call init(key, batch)")
        recipe = self._model
        types = jax.eval_shape(recipe.params, key, batch)
        graphdef, model_state = recipe.rest(key)
        call = self._step.bind(graphdef, types, model_state, batch)
        compiled = call.compiled
        leaves = make_on_devices(
            self._pipelined.compiler,
            recipe.params,
            [key, batch],
            compiled.pipeline.homes,
            compiled.cuts,
        )
        params = jax.tree.unflatten(call.structure, leaves)
        return self._step.start(graphdef, params, model_state, batch)

    def init_from(self, params: Any, batch: Any) -> TrainState:
        """Plan and compile for batches like `batch`, and return the first state, of `params`.

        Every parameter is copied to its own devices, one after the other, and its part of the
        optimizer's state is made there.

        Args:
          params: what `init` of the linen module returns as "params". A leaf may be any object with
            a shape, a dtype and `__array__`, such as a tensor in a file: it is read by the
            processes whose devices hold it, and dropped again before the next is read. It keeps its
            dtype.
          batch: a pytree of arrays.

        Raises:
          ValueError: the model has other parameters, or of other shapes; or it is an nnx model.
        """
        wanted = (
            None
            if isinstance(self._model, nnx.Module)
            else jax.eval_shape(self._model.params, jax.random.key(0), batch)
        )
        if wanted is None or isinstance(wanted, nnx.State):
            raise ValueError(
                "init_from is for linen modules; an nnx model brings its parameters: nnx.update it "
                "with yours, and call init(None, batch) of its own trainer"
            )
        _check_like(params, wanted)
        return self._step.init(params, batch)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take a step, consuming `state`; returns the next and the metrics, "loss" and "aux"."""
        return self._step(state, batch)

    def profile(
        self, state: TrainState, batch: Any, *, num_steps: int = 5
    ) -> tuple[TrainState, Profile]:
        """Take steps and measure when each device runs each task and transfer.

        GPUs run as they always do, under JAX's profiler, and a task is from its first kernel to its
        last. Elsewhere a recorded step waits for each task before the next of the same device is
        issued. Either costs time (of a trace, to begin and to read it); so as many steps that are
        not recorded are taken in between, to say how much.
        On CPUs of several processes the devices of one process take turns: give each one device.

        Args:
          state: consumed.
          batch: of every step.
          num_steps: how many steps to record.

        Returns:
          The state after all of them, and what was measured: the same timeline in every process.

        Raises:
          ProfileError: a trace cannot be read; it has the state after the steps.
        """
        return self._step.profile(state, batch, num_steps)

    def adapt(
        self, state: TrainState, batch: Any, *, num_steps: int = 3
    ) -> tuple[TrainState, Adaptation]:
        """Take steps, measure how long tasks take, and go on with the order that is best for that.

        For a device that is throttled, or batches that have become longer. The stages stay where
        they are, so no program of theirs is compiled again. What the step is predicted to take by
        a new partition is said, too; that needs a new trainer, with the plan `other`.

        Args:
          state: consumed.
          batch: of every step.
          num_steps: how many steps to record; the median one counts. See `profile`.

        Returns:
          The state after these steps, and what was found: the same plans in every process.

        Raises:
          ProfileError: nothing came of it, and the order stays; it has the state after the steps.
        """
        return self._step.adapt(state, batch, num_steps)

    def evaluate(self, state: TrainState, batch: Any) -> dict[str, Any]:
        """Return the metrics of a batch, by the forward alone."""
        return self._step.evaluate(state, batch)

    @property
    def plan(self) -> Plan:
        """Partition, placement and schedule."""
        return self._pipelined.plan

    @property
    def costs(self) -> Costs:
        """What the layers cost, by which the step was planned."""
        return self._pipelined.costs

    @property
    def timeline(self) -> Timeline:
        """The predicted step."""
        return self._pipelined.timeline

    @property
    def memory(self) -> tuple[DeviceMemory, ...]:
        """The memory of each device in a step; known before it runs."""
        return self._pipelined.memory

    @property
    def stages(self) -> tuple[CompiledStage, ...]:
        """The compiled stages."""
        return self._pipelined.stages

    @property
    def num_compilations(self) -> int:
        """How many programs were compiled to run so far."""
        return self._pipelined.num_compilations

    @property
    def num_tasks(self) -> int:
        """Tasks of this process in a step."""
        return self._step.num_tasks

    @property
    def host_s_per_task(self) -> float:
        """Seconds the host took to issue a task; see `TrainStep`."""
        return self._step.host_s_per_task


def _check_like(params: Any, wanted: Any) -> None:
    """Raise a ValueError unless the leaves of two pytrees have the same paths and shapes."""
    ours, theirs = _shapes(wanted), _shapes(params)
    wrong = [
        *(f"{path} is missing" for path in ours.keys() - theirs.keys()),
        *(f"the model has no {path}" for path in theirs.keys() - ours.keys()),
        *(
            f"{path} has shape {theirs[path]}, in the model {ours[path]}"
            for path in ours.keys() & theirs.keys()
            if ours[path] != theirs[path]
        ),
    ]
    if wrong:
        shown = sorted(wrong)[:NUM_SHOWN] + [f"{len(wrong)} in all"] * (len(wrong) > NUM_SHOWN)
        raise ValueError(
            f"these are not the parameters of this model: {'; '.join(shown)}; pass a tree like "
            "module.init(...)['params']"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_parts)
    }
