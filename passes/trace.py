"""From a loss function to a Program; what cannot be cut into stages is refused here."""

from collections.abc import Callable
from typing import Any

import jax

from passes import jaxprs
from passes.boxes import whole
from passes.jaxprs import Jaxpr
from passes.program import Program, Source

# Primitives bound to a mesh or a device of the user's own, which a stage does not have.
_BOUND_TO_DEVICES = ("shard_map", "sharding_constraint", "reshard")


def trace(
    loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any, *, has_aux: bool
) -> tuple[Program, Any]:
    """Trace `loss_fn(params, batch)`.

    Args:
      loss_fn: returns a scalar, or with `has_aux` a pair of a scalar and a pytree.
      params: pytree of `jax.ShapeDtypeStruct`.
      batch: pytree of `jax.ShapeDtypeStruct`, the shapes of one microbatch.
      has_aux: whether the function returns such a pair.

    Returns:
      The program, and the auxiliary output as a pytree of `jax.ShapeDtypeStruct` (None without).

    Raises:
      ValueError: a parameter has no gradient, the loss is not a scalar, or the function has side
        effects or a primitive that cannot be cut.
    """
    _check_params(params)
    jaxpr, constants, out = jaxprs.trace(loss_fn, params, batch)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            f"has_aux=True needs a function that returns (loss, aux), but it returned "
            f"{jax.tree.structure(out)}; return a pair or drop has_aux"
        )
    loss, aux = out if has_aux else (out, None)
    _check_loss(loss)
    _check_equations(jaxpr)
    program = Program(
        jaxpr=jaxpr,
        constants=tuple(constants),
        sources=tuple(
            Source(leaf=i, path=path, shape=leaf.shape, box=whole(leaf.shape))
            for i, (path, leaf) in enumerate(
                zip(paths(params), jax.tree.leaves(params), strict=True)
            )
        ),
        batch=paths(batch),
    )
    return program, aux


def paths(tree: Any) -> tuple[str, ...]:
    """Return the path of each leaf of a pytree, its keys joined by `/`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)


def _check_params(params: Any) -> None:
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if not jaxprs.is_float(leaf):
            raise ValueError(
                f"parameter {path} has dtype {leaf.dtype}, which has no gradient; pass it in the "
                "batch (batch_axes=None for its leaf) instead"
            )


def _check_loss(loss: Any) -> None:
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(loss)]
    if len(shapes) != 1 or not isinstance(loss, jax.ShapeDtypeStruct):
        raise ValueError(
            f"the loss must be one scalar, but the function returned {jax.tree.structure(loss)}; "
            "return a scalar, or (scalar, aux) with has_aux=True"
        )
    if loss.shape != ():
        raise ValueError(
            f"the loss must be a scalar, but it has shape {loss.shape}; return its mean"
        )
    if not jaxprs.is_float(loss):
        raise ValueError(f"the loss must be a float, but it has dtype {loss.dtype}")


def _check_equations(jaxpr: Jaxpr) -> None:
    for eqn in jaxprs.equations(jaxpr):
        name = eqn.primitive.name
        if eqn.effects and not any(True for _ in jaxprs.sub_jaxprs(eqn)):
            raise ValueError(
                f"the loss function has a side effect, {jaxprs.located(eqn)}; a "
                "pipeline runs stages many times and in another order, so remove it, or return "
                "the value with has_aux=True"
            )
        placed = name == "device_put" and any(d is not None for d in eqn.params["devices"])
        if placed or name in _BOUND_TO_DEVICES or jaxprs.has_shardings(eqn):
            raise ValueError(
                f"{jaxprs.located(eqn)} binds a value to devices of its own, so it "
                "cannot be cut into stages; remove it, jaxptis places every value itself"
            )
