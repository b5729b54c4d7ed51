"""How a batch is cut into microbatches, and their auxiliary outputs are joined."""

from collections.abc import Callable
from typing import Any

import jax

from jaxptis.executor.programs import BatchLeaf
from jaxptis.options import Options


def batch_leaves(batch: Any, options: Options) -> tuple[BatchLeaf, ...]:
    """Match the batch with `batch_axes`.

    Raises:
      ValueError: the axes do not fit the batch, or microbatches do not divide it.
    """
    try:
        axes = jax.tree.broadcast(options.batch_axes, batch, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            f"batch_axes {options.batch_axes!r} is no prefix of the batch, which is "
            f"{jax.tree.structure(batch)}; give an int, None, or a tree like the batch"
        ) from error
    paths = jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda x: x is None)
    flat = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
    count = options.num_microbatches
    leaves = []
    for (path, aval), axis in zip(paths, flat, strict=True):
        if aval is None:  # a batch may leave something out, and None is no leaf then
            continue
        name = f"batch leaf {jax.tree_util.keystr(path) or '(the whole batch)'}"
        if axis is not None and not -len(aval.shape) <= axis < len(aval.shape):
            raise ValueError(
                f"{name} has shape {aval.shape}, so it has no batch axis {axis}; give its axis in "
                "batch_axes, or None to pass it whole to every microbatch"
            )
        length = count if axis is None else aval.shape[axis]
        if length % count or length == 0:
            raise ValueError(
                f"{name} has shape {aval.shape}: {count} microbatches do not divide its batch of "
                f"{length}; change the batch or num_microbatches, or set its batch_axes to None "
                "to pass it whole to every microbatch"
            )
        positive = None if axis is None else axis % len(aval.shape)
        leaves.append(BatchLeaf(aval=aval, axis=positive, size=length // count))
    return tuple(leaves)


def aux_axes(
    loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any, aux: Any, options: Options
) -> list[int | None]:
    """Return the axis of each auxiliary leaf that grows with the batch; None where none does.

    Raises:
      ValueError: a leaf neither grows with the batch in one axis nor has a mean.
    """
    if not options.has_aux or not jax.tree.leaves(aux):
        return []
    _, whole = jax.eval_shape(loss_fn, params, batch)
    axes: list[int | None] = []
    for (path, part), full in zip(
        jax.tree_util.tree_leaves_with_path(aux), jax.tree.leaves(whole), strict=True
    ):
        name = f"auxiliary output {jax.tree_util.keystr(path)}"
        grown = [i for i, (a, b) in enumerate(zip(part.shape, full.shape, strict=True)) if a != b]
        if not grown and options.num_microbatches > 1:
            if not jax.numpy.issubdtype(part.dtype, jax.numpy.inexact):
                raise ValueError(
                    f"{name} has dtype {part.dtype} and no batch axis, so microbatches have no "
                    "mean; return a float mean, or one value a sample"
                )
            axes.append(None)
        elif not grown:
            axes.append(None)
        elif len(grown) == 1 and full.shape[grown[0]] == (
            part.shape[grown[0]] * options.num_microbatches
        ):
            axes.append(grown[0])
        else:
            raise ValueError(
                f"{name} has shape {part.shape} for a microbatch and {full.shape} for the batch; "
                f"one axis must be {options.num_microbatches} times as long, or none"
            )
    return axes
