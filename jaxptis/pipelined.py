"""A loss function as a pipeline: gradients, evaluation and training steps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from jaxptis.call import Call, Compiled, CompiledStage
from jaxptis.compile import Given, compile_pipeline
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.memory import DeviceMemory
from jaxptis.flax_models import nnx_loss, split_nnx
from jaxptis.options import Options
from jaxptis.parts import flatten
from jaxptis.performance import Costs, Timeline
from jaxptis.placement import aval_of
from jaxptis.plan import Plan
from jaxptis.train_step import TrainStep


class Pipelined:
    """A loss function that runs as a pipeline; `jaxptis.pipeline` makes it.

    It is planned and compiled when it is first called, under JAX's configuration at that time, and
    again for every other shape of the batch, with the same plan if the layers are the same. A
    training step is planned with its optimizer's state: anew if only gradients were called before,
    whose plan leaves no memory for it. Later nothing is planned anew, as the state would move at
    every step. What it shows of itself is the last gradient or training step.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any], options: Callable[[], Options]) -> None:
        """Wrap `loss_fn`; `options` is asked for at the first call."""
        self._loss_fn = loss_fn
        self._make_options = options
        # A structure of an nnx model need not be hashable, so it is compared.
        self._compiled: dict[Any, dict[Any, list[tuple[Any, Compiled]]]] = {}
        self._plans: dict[Any, Plan] = {}
        self.shown: Compiled | None = None

    def value_and_grad(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """Return what `jax.value_and_grad(loss_fn, has_aux=has_aux)(params, batch)` returns.

        Args:
          params: a pytree of float arrays, or an nnx model (its `nnx.Param`s are then the
            parameters, and the gradients an `nnx.State`). For a leaf in parts, as training states
            have them, the gradient is in the same parts.
          batch: a pytree of arrays.

        Returns:
          The loss, or (loss, aux), and the gradients, each on the device that owns its parameter,
          or most of it; `train_step` feeds them to an optimizer there, in parts.
        """
        call = self._call(params, batch)
        self.shown, call.compiled.used = call.compiled, None
        step = call.compiled.gradient_step
        outs = step.executable([*call.params_buffers(), *call.batch_buffers()])
        value, grads = call.split(outs)
        leaves = call.like_params(step.placement.arrays(grads))
        return value, jax.tree.unflatten(call.structure, leaves)

    def evaluate(self, params: Any, batch: Any) -> Any:
        """Return what `loss_fn(params, batch)` returns, by the forward alone."""
        call = self._call(params, batch)
        outs = call.compiled.evaluation([*call.params_buffers(), *call.batch_buffers()])
        return call.split(outs)[0]

    def train_step(self, optimizer: optax.GradientTransformation) -> TrainStep:
        """Return a training step with an optimizer, which may mix all parameters."""
        return TrainStep(self, optimizer)

    def compile(self, params: Any, batch: Any) -> "Pipelined":
        """Plan and compile the gradient for arguments of these types, and return this object.

        The plan leaves no memory for an optimizer's state: a training step may refuse it as a
        strategy.
        """
        self.shown = self._call(params, batch).compiled
        self.shown.stages()
        return self

    def lower(self, params: Any, batch: Any) -> tuple[CompiledStage, ...]:
        """Plan for arguments of these types, and return the stages of the gradient.

        Each of their programs is compiled when it is looked at, for those who want few of a large
        model.
        """
        self.shown = self._call(params, batch).compiled
        return self.shown.uncompiled_stages()

    @property
    def plan(self) -> Plan:
        """Partition, placement and schedule of the step used last."""
        return self._used().pipeline.plan

    @property
    def costs(self) -> Costs:
        """What the layers cost in the step used last, which was planned by it."""
        return self._used().costs

    @property
    def timeline(self) -> Timeline:
        """The predicted step, of the step used last."""
        return self._used().timeline

    @property
    def memory(self) -> tuple[DeviceMemory, ...]:
        """The memory of each device, in the step used last; known before it runs."""
        return self._used().memory()

    @property
    def stages(self) -> tuple[CompiledStage, ...]:
        """The compiled stages, of the step used last."""
        return self._used().stages()

    @property
    def num_compilations(self) -> int:
        """How many programs were compiled to run, for all shapes and steps so far."""
        return self.compiler.num_compilations

    @functools.cached_property
    def options(self) -> Options:
        """What the user chose; devices are looked up at the first call, not before."""
        return self._make_options()

    @functools.cached_property
    def compiler(self) -> Compiler:
        """What compiles for the devices, and remembers it."""
        return Compiler(self.options.devices)

    def _used(self) -> Compiled:
        if self.shown is None:
            raise ValueError("nothing is planned before the shapes are known; call compile first")
        return self.shown

    def _call(self, params: Any, batch: Any) -> Call:
        graphdef = None
        if isinstance(params, nnx.Module):
            graphdef, params, rest = split_nnx(params)
            batch = (rest, batch)
        return self.bind(graphdef, params, batch)

    def bind(
        self,
        graphdef: Any,
        params: Any,
        batch: Any,
        optimizer: optax.GradientTransformation | None = None,
    ) -> Call:
        """Return a call with these arguments, compiling for their types if they are new.

        Args:
          graphdef: the structure of an nnx model, or None.
          params: its parameters, or any pytree of float arrays.
          batch: the batch; for an nnx model a pair of its other variables and the batch.
          optimizer: of a training step, for whose state the plan must leave memory.
        """
        leaves, structure = flatten(params)
        batch_leaves, batch_structure = jax.tree.flatten(batch)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves([leaves, batch_leaves])):
            raise ValueError(
                "a pipeline runs compiled programs on several devices, so it cannot be traced "
                "itself; call it outside of jit, grad, vmap and eval_shape"
            )
        model, shapes = (structure, _types(leaves)), (batch_structure, _types(batch_leaves))
        known = self._compiled.setdefault(model, {})

        def new(previous: Plan | None) -> Compiled:
            compiled = self._compile(graphdef, params, batch, optimizer, previous)
            self._plans[model] = compiled.pipeline.plan
            known.setdefault(shapes, []).append((graphdef, compiled))
            return compiled

        compiled = next((each for of, each in known.get(shapes, ()) if of == graphdef), None)
        if compiled is None and model in self._plans:
            compiled = new(self._plans[model])
        if compiled is None or not (
            optimizer is None
            or compiled.fits(optimizer)
            or any(each.trains for same in known.values() for _, each in same)
        ):
            known.clear()
            compiled = new(previous=None)
        self.shown = self.shown or compiled
        return Call(compiled, structure, leaves, batch_leaves)

    def replace(self, old: Compiled, new: Compiled) -> None:
        """Let calls that have used `old` use `new` from now on: with another order, say."""
        for model, plan in self._plans.items():
            if plan is old.pipeline.plan:
                self._plans[model] = new.pipeline.plan
        for known in self._compiled.values():
            for same in known.values():
                same[:] = [(of, new if each is old else each) for of, each in same]

    def _compile(
        self,
        graphdef: Any,
        params: Any,
        batch: Any,
        optimizer: optax.GradientTransformation | None,
        previous: Plan | None,
    ) -> Compiled:
        options, loss_fn = self.options, self._loss_fn
        if graphdef is not None:
            loss_fn = nnx_loss(graphdef, loss_fn)
            options = dataclasses.replace(options, batch_axes=(None, options.batch_axes))
        leaves, structure = flatten(params)
        params = jax.tree.unflatten(structure, map(aval_of, leaves))
        pipeline = compile_pipeline(
            loss_fn,
            params,
            jax.tree.map(aval_of, batch),
            options,
            optimizer=optimizer,
            given=Given.of(leaves, jax.tree.leaves(batch)),
            previous=previous,
        )
        return Compiled(pipeline, self.compiler)


def _types(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((aval.shape, aval.dtype, aval.weak_type) for aval in map(aval_of, leaves))
