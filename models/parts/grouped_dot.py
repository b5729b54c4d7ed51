"""A matmul of rows that stand in groups, each group with a matrix of its own.

Shapes: A rows that are given, S places for them, E groups, D width of a row, F width of a result,
L places of a block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from models.parts import grouped_kernel

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where each row stands, sorted by group, and who stands in each place: A where nobody does."""

    sizes_E: jax.Array
    place_A: jax.Array
    row_S: jax.Array


def arrange(group_A: jax.Array, num_groups: int) -> Places:
    """Gives every row a place in its group.

    On a CPU every group has a block of L places for itself, so that one batched matmul multiplies
    all. Should one have more rows than that, the groups follow one another, the empty places last.
    Elsewhere they always do, and no place is empty.
    """
    num_rows = group_A.size
    sizes_E = jnp.bincount(group_A, length=num_groups)
    row_A = jnp.argsort(group_A)
    place_A = jnp.argsort(row_A)
    if jax.default_backend() != "cpu":
        return Places(sizes_E=sizes_E, place_A=place_A, row_S=row_A)
    length = _block_length(num_rows, num_groups)
    fit, begins_E = sizes_E.max() <= length, _edges(sizes_E)[0]
    apart_EL = begins_E[:, None] + jnp.arange(length)
    apart_EL = jnp.where(jnp.arange(length) < sizes_E[:, None], apart_EL, num_rows)
    sorted_S = jnp.where(fit, apart_EL.reshape(-1), jnp.arange(apart_EL.size))
    gaps_E = jnp.where(fit, jnp.arange(num_groups) * length - begins_E, 0)
    return Places(
        sizes_E=sizes_E,
        place_A=place_A + gaps_E[group_A],
        row_S=row_A.at[sorted_S].get(mode="fill", fill_value=num_rows),
    )


def _block_length(num_rows: int, num_groups: int) -> int:
    """Returns as many rows as hardly a group exceeds if every row's group is drawn at random."""
    mean = num_rows / num_groups
    return min(num_rows, 8 * math.ceil((mean + 4 * math.sqrt(mean)) / 8))


def grouped_dot(x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiplies every row by the matrix of its group, where rows stand as `arrange` says.

    Empty places must hold 0. This is jax.lax.ragged_dot. But that, on a CPU and on a GPU,
    multiplies all rows by all matrices. So where CPUs are JAX's default, this is a batched matmul,
    or, if a group has more rows than its block, a loop over the groups. Where GPUs are, it is
    kernels.
    """
    if jax.default_backend() in ("cpu", "gpu"):
        return _grouped_dot(x_SD, w_EDF, sizes_E)
    return jax.lax.ragged_dot(x_SD, w_EDF, sizes_E)


@jax.custom_vjp
def _grouped_dot(x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    if jax.default_backend() == "gpu":
        return grouped_kernel.multiply(x_SD, w_EDF, sizes_E)
    return _multiply("LD,DF->LF", x_SD, w_EDF, sizes_E, width=w_EDF.shape[2])


_Inputs = tuple[jax.Array, jax.Array, jax.Array]


def _forward(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_dot(*inputs), inputs


def _backward(inputs: _Inputs, dy_SF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_SD, w_EDF, sizes_E = inputs
    if jax.default_backend() == "gpu":
        dx_SD = grouped_kernel.multiply(dy_SF, w_EDF, sizes_E, transposed=True)
        return dx_SD, grouped_kernel.contract(x_SD, dy_SF, sizes_E), None
    dx_SD = _multiply("LF,DF->LD", dy_SF, w_EDF, sizes_E, width=w_EDF.shape[1])
    return dx_SD, _contract(x_SD, dy_SF, sizes_E), None


_grouped_dot.defvjp(_forward, _backward)


def _multiply(
    subscripts: str, x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, width: int
) -> jax.Array:
    """Returns every row times the matrix of its group, or times the transpose of it."""
    blocks_ELD = x_SD.reshape(sizes_E.shape[0], -1, x_SD.shape[1])
    num_places, length = x_SD.shape[0], blocks_ELD.shape[1]
    dot = functools.partial(jnp.einsum, subscripts)

    def at_once() -> jax.Array:
        return jax.vmap(dot)(blocks_ELD, w_EDF).reshape(num_places, width)

    def add_group(y_SF: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        w_DF, begin, end = group

        def add_block(y_SF: jax.Array, place: jax.Array, is_own_L1: jax.Array) -> jax.Array:
            x_LD, y_LF = (jax.lax.dynamic_slice_in_dim(a, place, length) for a in (x_SD, y_SF))
            y_LF = jnp.where(is_own_L1, dot(x_LD, w_DF), y_LF)
            return jax.lax.dynamic_update_slice_in_dim(y_SF, y_LF, place, axis=0)

        return _over_blocks(add_block, y_SF, begin, end, length, num_places), None

    def in_a_loop() -> jax.Array:
        zeros_SF = jnp.zeros((num_places, width), x_SD.dtype)
        return jax.lax.scan(add_group, zeros_SF, (w_EDF, *_edges(sizes_E)))[0]

    return jax.lax.cond(sizes_E.max() <= length, at_once, in_a_loop)


def _contract(x_SD: jax.Array, dy_SF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns x^T dy over the rows of each group, (E, D, F)."""
    num_groups, num_places = sizes_E.shape[0], x_SD.shape[0]
    length = num_places // num_groups
    dot = functools.partial(jnp.einsum, "LD,LF->DF", preferred_element_type=jnp.float32)

    def at_once() -> jax.Array:
        x_ELD, dy_ELF = (a.reshape(num_groups, length, -1) for a in (x_SD, dy_SF))
        return jax.vmap(dot)(x_ELD, dy_ELF).astype(x_SD.dtype)

    def of_group(_: None, group: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        begin, end = group

        def add_block(sum_DF: jax.Array, place: jax.Array, is_own_L1: jax.Array) -> jax.Array:
            x_LD, dy_LF = (jax.lax.dynamic_slice_in_dim(a, place, length) for a in (x_SD, dy_SF))
            return sum_DF + dot(jnp.where(is_own_L1, x_LD, 0), dy_LF)

        zeros_DF = jnp.zeros((x_SD.shape[1], dy_SF.shape[1]), jnp.float32)
        sum_DF = _over_blocks(add_block, zeros_DF, begin, end, length, num_places)
        return None, sum_DF.astype(x_SD.dtype)

    def in_a_loop() -> jax.Array:
        return jax.lax.scan(of_group, None, _edges(sizes_E))[1]

    return jax.lax.cond(sizes_E.max() <= length, at_once, in_a_loop)


def _over_blocks(
    step: Callable[[T, jax.Array, jax.Array], T],
    initial: T,
    begin: jax.Array,
    end: jax.Array,
    length: int,
    num_places: int,
) -> T:
    """Takes a step for each block of the places from `begin` to `end`.

    A step is told where its block begins, and which of the places are its own: a block in the end
    has others too, of the next group, or, as it must not go past the last place, done before.
    """

    def take_step(i: jax.Array, carry: T) -> T:
        first = begin + i * length
        place = jnp.minimum(first, num_places - length)
        places_L = place + jnp.arange(length)
        return step(carry, place, ((first <= places_L) & (places_L < end))[:, None])

    return jax.lax.fori_loop(0, -(-(end - begin) // length), take_step, initial)


def _edges(sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    ends_E = jnp.cumsum(sizes_E)
    return ends_E - sizes_E, ends_E
