"""Flax modules, linen and nnx, as plain functions of parameters and a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

Loss = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a model that has no parameters yet.

    Attributes:
      params: maps a key and a batch to the parameters.
      rest: maps a key to the structure and the other variables of an nnx model; (None, None) for
        linen.
    """

    params: Callable[[Any, Any], Any]
    rest: Callable[[Any], tuple[Any, Any]]


def linen_loss(module: linen.Module, loss: Loss) -> Loss:
    """Return loss(params, batch), where `loss` is given the module with its parameters bound."""

    def loss_fn(params: Any, batch: Any) -> Any:
        return loss(functools.partial(module.apply, {"params": params}), batch)

    return loss_fn


def linen_recipe(module: linen.Module, loss: Loss) -> Recipe:
    """Return how to make the parameters of `module`, which is called as `loss` calls it.

    Raises:
      ValueError: when run, if the loss never calls the model, or it holds more than parameters.
    """

    def init(key: Any, batch: Any) -> Any:
        made: list[Any] = []

        def model(*args: Any, rngs: Any = None, **kwargs: Any) -> Any:
            if made:
                return module.apply(made[0], *args, rngs=rngs, **kwargs)
            streams = {"params": key, **(rngs if isinstance(rngs, dict) else {})}
            # What a call may change, beside the parameters, is not made with them.
            changes = {"mutable": kwargs.pop("mutable")} if "mutable" in kwargs else {}
            out, variables = module.init_with_output(streams, *args, **kwargs)
            made.append(variables)
            if changes:
                return module.apply(variables, *args, rngs=rngs, **kwargs, **changes)
            return out

        loss(model, batch)
        if not made:
            raise ValueError("the loss never calls the model it is given; call model(inputs)")
        others = sorted(set(made[0]) - {"params"})
        if others:
            raise ValueError(
                f"the model has collections {', '.join(others)} beside its parameters; a pipeline "
                "trains modules whose only collection is 'params'"
            )
        return made[0]["params"]

    return Recipe(params=init, rest=lambda key: (None, None))


def nnx_recipe(make: Callable[[nnx.Rngs], nnx.Module]) -> Recipe:
    """Return how to make the parameters of the model that `make` returns."""

    def params(key: Any, batch: Any) -> Any:
        return split_nnx(make(nnx.Rngs(key)))[1]

    def rest(key: Any) -> tuple[Any, Any]:
        graphdef = split_nnx(nnx.eval_shape(lambda: make(nnx.Rngs(key))))[0]
        return graphdef, jax.jit(lambda key: split_nnx(make(nnx.Rngs(key)))[2])(key)

    return Recipe(params=params, rest=rest)


def nnx_loss(graphdef: Any, loss: Loss) -> Loss:
    """Return loss(params, (rest, batch)), where `loss` is given the model merged from its parts.

    Raises:
      ValueError: when traced, if the loss changes a variable of the model.
    """

    def loss_fn(params: Any, rest_and_batch: Any) -> Any:
        rest, batch = rest_and_batch
        model = nnx.merge(graphdef, params, rest)
        before = _leaves(model)
        out = loss(model, batch)
        for path, value in _leaves(model).items():
            if before.get(path) is not value:
                raise ValueError(
                    f"the loss changes the model's variable {path}, which a pipeline cannot do: "
                    "microbatches run in any order; keep it fixed (eval mode), or pass the value, "
                    "such as a dropout key, in the batch"
                )
        return out

    return loss_fn


def split_nnx(model: nnx.Module) -> tuple[Any, Any, Any]:
    """Return the structure of a model, its parameters, and its other variables."""
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts


def _leaves(model: nnx.Module) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in paths}
