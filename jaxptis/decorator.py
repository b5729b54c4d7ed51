"""The decorator: a loss function or a Flax module class becomes a pipeline."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import linen, nnx

from jaxptis.cluster import Cluster
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.measure_links import measure_links
from jaxptis.flax_models import Loss, linen_loss, linen_recipe, nnx_recipe
from jaxptis.options import CostsSource, Options, Strategy
from jaxptis.pipelined import Pipelined
from jaxptis.trainer import Trainer


def pipeline(
    target: Any = None,
    *,
    num_microbatches: int,
    devices: Sequence[Any] | None = None,
    strategy: Strategy = "best",
    batch_axes: Any = 0,
    has_aux: bool = False,
    cluster: Cluster | None = None,
    dump_to: str | None = None,
    head_slices: int | Sequence[int] = 1,
    costs: CostsSource = "estimated",
) -> Any:
    """Turn a loss function, or a Flax module class, into a pipeline; also used as a decorator.

    The loss of a batch is the mean over its microbatches of `loss_fn(params, microbatch)`, and the
    gradients are those of this mean: what `loss_fn` gives for the whole batch if it is itself a
    mean over samples of equal weight.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.tanh(x @ w) ** 2)
    >>> pipelined = pipeline(loss_fn, num_microbatches=2, devices=jax.devices()[:1])
    >>> loss, grads = pipelined.value_and_grad(jnp.ones((3, 2)), jnp.ones((4, 3)))
    >>> grads.shape
    (3, 2)

    Args:
      target: `loss_fn(params, batch)`, which returns a scalar, or with `has_aux` a scalar and a
        pytree; then the result is a `Pipelined`. Or a class derived from `flax.linen.Module` or
        `flax.nnx.Module`; then the result is a class like it with one more method, `trainer(*,
        loss, optimizer)`, where `loss(model, batch)` calls the model. On a linen instance it takes
        just that. On an nnx class it also takes the arguments of the class, except `rngs`, and the
        parameters are drawn on their own devices; on an nnx instance it trains the parameters that
        the instance has. None returns a decorator with the other arguments bound.
      num_microbatches: parts that each batch is cut into.
      devices: the pipeline's devices, in order; by default all that JAX sees. Under
        `jax.distributed` each process must have some of them, and makes the same calls with equal
        arguments: whole batches, of which it puts what its own devices read.
      strategy: "best", which searches for the shortest predicted step that fits the memory of the
        devices, that of a training step with its optimizer's state: in seconds for few layers, in a
        minute and a half for 128 layers, 64 devices and 256 microbatches; the name of a schedule,
        perhaps with options, such as "1f1b", "zb-v" or "interleaved(v=3)", which balances the
        layers over its stages, or with the option "partition=uniform" puts as many in each;
        "adaptis", which tunes phase by phase, or "mist", which is "1f1b" with layers cut for it and
        for the memory; a `jaxptis.Plan`; or the path of a plan file, or of a schedule as a CSV
        file.
      batch_axes: the batch axis of each leaf of the batch: an int, None (such a leaf, say a
        dropout key, is given whole to every microbatch), or a tree prefix of these.
      has_aux: whether the loss function also returns an auxiliary output. Of a leaf that grows
        with the batch the microbatches' parts are concatenated, of others the mean is taken.
      cluster: what the devices can do; looked up by their kind if None. With measured costs, what
        connects them is then measured, too.
      dump_to: folder for every form of the program on the way, as numbered text files.
      head_slices: parts of the vocabulary into which the matmul before a softmax cross-entropy is
        cut, each a layer of its own, so that several stages can share a large head. Of several
        heads, such as DeepSeek-V3's for the next token and the one after, the last is cut. Of
        several numbers, the one whose plan has the shortest predicted step is taken; those with
        which there is no plan are left out. Planning takes as many times as long.
      costs: what the layers take, by which they are balanced: "estimated" from what XLA counts in
        them; "measured", by running each kind of layer on the first device of every process; a
        `jaxptis.Costs`; or the path of a file that its `save` or a person wrote.

    Raises:
      ValueError: an argument is out of range or of the wrong kind.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches is {num_microbatches}; use 1 or more")
    choices = tuple(head_slices) if isinstance(head_slices, Sequence) else (head_slices,)
    if min(choices, default=0) < 1:
        raise ValueError(f"head_slices is {head_slices}; use 1 to leave the head whole, or more")

    def options() -> Options:
        chosen = tuple(jax.devices() if devices is None else devices)
        if len(set(chosen)) < max(1, len(chosen)):
            raise ValueError(
                f"{len(chosen)} devices are given, {len(set(chosen))} of them different; give each "
                "device once, and at least one"
            )
        known = Cluster.of(chosen) if cluster is None else cluster
        if len(known.devices) != len(chosen):
            raise ValueError(
                f"the cluster describes {len(known.devices)} devices, but the pipeline has "
                f"{len(chosen)}; describe each device once, in order"
            )
        kinds = {(d.kind, d.flops_per_s, d.bytes_per_s) for d in known.devices}
        if len(kinds) > 1:
            raise ValueError(
                f"the devices differ ({', '.join(sorted(kind for kind, *_ in kinds))}), but costs "
                "are those of one kind; choose devices of one kind, or pass a cluster that "
                "describes them as one kind with another speed: DeviceSpec(..., speed=0.5)"
            )
        if cluster is None and costs == "measured":
            known = measure_links(known, Compiler(chosen))
        return Options(
            num_microbatches=num_microbatches,
            devices=chosen,
            strategy=strategy,
            batch_axes=batch_axes,
            has_aux=has_aux,
            cluster=known,
            dump_to=dump_to,
            head_slices=choices,
            costs=costs,
        )

    def wrap(target: Any) -> Any:
        make = functools.partial(Pipelined, options=options)
        if isinstance(target, type) and issubclass(target, linen.Module):
            return _subclass(target, trainer=_linen_trainer(make))
        if isinstance(target, type) and issubclass(target, nnx.Module):
            return _subclass(target, trainer=_NnxTrainer(make))
        if isinstance(target, linen.Module | nnx.Module) or not callable(target):
            raise ValueError(
                f"pipeline takes a loss function or a Flax module class, not {type(target)}; "
                "decorate the class, or wrap a function loss_fn(params, batch)"
            )
        return make(target)

    return wrap if target is None else wrap(target)


def _subclass(cls: type, **members: Any) -> type:
    """Return a class like `cls`, of the same name, with more members."""
    for name in members:
        if hasattr(cls, name) or name in getattr(cls, "__dataclass_fields__", ()):
            raise ValueError(
                f"{cls.__name__} has an attribute {name!r}, which pipeline would hide; rename it"
            )
    same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {**same, **members})


def _linen_trainer(make: Callable[[Loss], Pipelined]) -> Callable[..., Trainer]:
    @linen.nowrap
    def trainer(
        self: linen.Module, *, loss: Loss, optimizer: optax.GradientTransformation
    ) -> Trainer:
        """Return a trainer of this module; see `jaxptis.pipeline`."""
        return Trainer(make(linen_loss(self, loss)), optimizer, linen_recipe(self, loss))

    return trainer


class _NnxTrainer:
    """`trainer` of an nnx class, which draws parameters, and of its instances, which have them."""

    def __init__(self, make: Callable[[Loss], Pipelined]) -> None:
        self._make = make

    def __get__(self, instance: nnx.Module | None, owner: type) -> Callable[..., Trainer]:
        return (
            functools.partial(self._of_class, owner)
            if instance is None
            else functools.partial(self._of_instance, instance)
        )

    def _of_class(
        self,
        cls: type,
        *args: Any,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        **kwargs: Any,
    ) -> Trainer:
        recipe = nnx_recipe(lambda rngs: cls(*args, rngs=rngs, **kwargs))
        return Trainer(self._make(loss), optimizer, recipe)

    def _of_instance(
        self, model: nnx.Module, *, loss: Loss, optimizer: optax.GradientTransformation
    ) -> Trainer:
        return Trainer(self._make(loss), optimizer, model)
