"""Reductions along the vocabulary, slice by slice: what a cross-entropy reads of its logits.

A reduction maps a slice, and what the slices before it gave, to what they give together. What it
carries has size 1 along the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from passes import jaxprs
from passes.jaxprs import JaxprEqn
from passes.slice_values import Part

Take = Callable[[Part], Any]
Reduction = Callable[[Part, Any], Any]  # before the first slice there is None


def sum_of(take: Take, axis: int) -> Reduction:
    """Return the reduction to a sum, in at least float32."""

    def reduction(part: Part, before: Any) -> Any:
        total = at_least_float32(take(part)).sum(axis, keepdims=True)
        return total if before is None else before + total

    return reduction


def softmax_of(take: Take, axis: int) -> Reduction:
    """Return the reduction to (maximum, sum of exp(z - finite(maximum))), in at least float32.

    The maximum has no gradient, and needs none where the results are used together.
    """

    # The backward runs it again: what it saves are logits, which may be of a smaller type.
    @jax.checkpoint
    def sum_exp(z: Any, maximum: Any, before: Any) -> Any:
        total = jnp.exp(z - finite(maximum)).sum(axis, keepdims=True)
        if before is None:
            return total
        old_maximum, old_total = before
        return old_total * jnp.exp(finite(old_maximum) - finite(maximum)) + total

    def reduction(part: Part, before: Any) -> Any:
        z = at_least_float32(take(part))
        maximum = jax.lax.stop_gradient(z).max(axis, keepdims=True)
        if before is not None:
            before = jax.lax.stop_gradient(before[0]), before[1]
            maximum = jnp.maximum(before[0], maximum)
        return maximum, sum_exp(z, maximum, before)

    return reduction


def at_least_float32(values: Any) -> Any:
    """Return the values in float32 where they have a smaller type."""
    values = jnp.asarray(values)
    return values if jnp.finfo(values.dtype).bits >= 32 else values.astype(jnp.float32)


def finite(maximum: Any) -> Any:
    """Return what may be subtracted from logits: minus infinity, of masked ones, may not."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0)


def pick_of(eqn: JaxprEqn, take: Take, axis: int, size: int) -> Reduction:
    """Return the reduction to what a gather takes, one entry of the vocabulary for each index.

    Each slice gives the entries that it has, and zero for the others. Outside of the vocabulary the
    gather's mode decides.
    """

    def reduction(part: Part, before: Any) -> Any:
        indices = part.whole(eqn.invars[1])
        targets = _targets(eqn, indices, axis)
        outside = (targets < 0) | (targets >= size)
        if not _fills(eqn):
            targets = jnp.clip(targets, 0, size - 1)
        local = jnp.clip(targets - part.start, 0, part.width - 1)
        picked = _gather(eqn, take(part), indices, axis, local)
        here = (targets >= part.start) & (targets < part.stop)
        picked = jnp.where(_at_result(eqn, here), picked, 0)
        if before is None and _fills(eqn):
            value = eqn.params["fill_value"]
            zeros = jnp.zeros_like(picked)
            before = jnp.where(_at_result(eqn, outside), jnp.nan if value is None else value, zeros)
        return picked if before is None else before + picked

    return reduction


def pick_constant(eqn: JaxprEqn, value: Any, indices: Any, axis: int, size: int) -> Any:
    """Return what a gather takes from a value of size 1 instead of `size` along the vocabulary."""
    targets = _targets(eqn, indices, axis)
    # Outside of the vocabulary, where nothing has a gradient, stays outside.
    outside = (targets < 0) | (targets >= size)
    return _gather(eqn, value, indices, axis, (outside & _fills(eqn)).astype(targets.dtype))


def _fills(eqn: JaxprEqn) -> bool:
    return eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP


def _component(eqn: JaxprEqn, axis: int) -> int:
    """Return the position, in each index vector, of that along `axis`."""
    return eqn.params["dimension_numbers"].start_index_map.index(axis)


def _targets(eqn: JaxprEqn, indices: Any, axis: int) -> Any:
    targets = jax.lax.index_in_dim(indices, _component(eqn, axis), axis=-1, keepdims=False)
    return targets.astype(jnp.promote_types(targets.dtype, jnp.int32))  # bytes cannot be offset


def _gather(eqn: JaxprEqn, operand: Any, indices: Any, axis: int, targets: Any) -> Any:
    """Run a gather with another operand, of any size along `axis`, and other indices into it."""
    columns = [
        jax.lax.index_in_dim(indices, i, axis=-1).astype(targets.dtype)
        for i in range(indices.shape[-1])
    ]
    columns[_component(eqn, axis)] = targets[..., None]
    params = {**eqn.params, "indices_are_sorted": False, "unique_indices": False}
    return eqn.primitive.bind(operand, jnp.concatenate(columns, axis=-1), **params)


def _at_result(eqn: JaxprEqn, mask: Any) -> Any:
    """Give a mask over the indices of a gather the shape of its result."""
    (aval,) = jaxprs.avals(eqn.outvars)
    offsets = eqn.params["dimension_numbers"].offset_dims
    kept = [i for i in range(len(aval.shape)) if i not in offsets]
    return jax.lax.broadcast_in_dim(mask, aval.shape, kept)
