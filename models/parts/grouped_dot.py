"""A matmul of rows that stand in groups, each group with a matrix of its own.

Shapes: A rows, E groups, D width of a row, F width of a result, L rows of a block.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from models.parts import grouped_kernel

T = TypeVar("T")

# With as few rows in a block, matrices are read for longer than they are multiplied; and a batched
# matmul reads them once, where a loop copies them.
_FEW_ROWS = 32


def grouped_dot(x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiplies the first sizes_E[0] rows by w_EDF[0], the next sizes_E[1] by w_EDF[1], and so on.

    This is jax.lax.ragged_dot. But that, on a CPU and on a GPU, multiplies all rows by all
    matrices. So where CPUs are JAX's default, this has a loop over the groups, or, with few rows in
    each, one matmul; and where GPUs are, kernels.
    """
    if jax.default_backend() in ("cpu", "gpu"):
        return _grouped_dot(x_AD, w_EDF, sizes_E)
    return jax.lax.ragged_dot(x_AD, w_EDF, sizes_E)


@jax.custom_vjp
def _grouped_dot(x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    if jax.default_backend() == "gpu":
        return grouped_kernel.multiply(x_AD, w_EDF, sizes_E)
    return _multiply("LD,DF->LF", x_AD, w_EDF, sizes_E, width=w_EDF.shape[2])


_Inputs = tuple[jax.Array, jax.Array, jax.Array]


def _forward(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_dot(*inputs), inputs


def _backward(inputs: _Inputs, dy_AF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_AD, w_EDF, sizes_E = inputs
    if jax.default_backend() == "gpu":
        dx_AD = grouped_kernel.multiply(dy_AF, w_EDF, sizes_E, transposed=True)
        return dx_AD, grouped_kernel.contract(x_AD, dy_AF, sizes_E), None
    dx_AD = _multiply("LF,DF->LD", dy_AF, w_EDF, sizes_E, width=w_EDF.shape[1])
    return dx_AD, _contract(x_AD, dy_AF, sizes_E), None


_grouped_dot.defvjp(_forward, _backward)


def _multiply(
    subscripts: str, x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, width: int
) -> jax.Array:
    """Returns every row times the matrix of its group, or times the transpose of it."""
    num_rows, length = x_AD.shape[0], _block_length(x_AD, sizes_E)
    dot = functools.partial(jnp.einsum, subscripts)
    zeros_AF = jnp.zeros((num_rows, width), x_AD.dtype)

    def at_once() -> jax.Array:
        rows_EL = _rows_of_groups(sizes_E, length, num_rows)
        y_ELF = jax.vmap(dot)(x_AD.at[rows_EL].get(mode="clip"), w_EDF)
        return zeros_AF.at[rows_EL].set(y_ELF, mode="drop")

    def add_group(y_AF: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        w_DF, begin, end = group

        def add_block(y_AF: jax.Array, row: jax.Array, is_own_L1: jax.Array) -> jax.Array:
            x_LD, y_LF = (jax.lax.dynamic_slice_in_dim(a, row, length) for a in (x_AD, y_AF))
            y_LF = jnp.where(is_own_L1, dot(x_LD, w_DF), y_LF)
            return jax.lax.dynamic_update_slice_in_dim(y_AF, y_LF, row, axis=0)

        return _over_blocks(add_block, y_AF, begin, end, length, num_rows), None

    def in_a_loop() -> jax.Array:
        return jax.lax.scan(add_group, zeros_AF, (w_EDF, *_edges(sizes_E)))[0]

    return _quickest(at_once, in_a_loop, sizes_E, length)


def _contract(x_AD: jax.Array, dy_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns x^T dy over the rows of each group, (E, D, F)."""
    num_rows, length = x_AD.shape[0], _block_length(x_AD, sizes_E)
    dot = functools.partial(jnp.einsum, "LD,LF->DF", preferred_element_type=jnp.float32)

    def at_once() -> jax.Array:
        rows_EL = _rows_of_groups(sizes_E, length, num_rows)
        x_ELD = x_AD.at[rows_EL].get(mode="fill", fill_value=0)
        return jax.vmap(dot)(x_ELD, dy_AF.at[rows_EL].get(mode="clip")).astype(x_AD.dtype)

    def of_group(_: None, group: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        begin, end = group

        def add_block(sum_DF: jax.Array, row: jax.Array, is_own_L1: jax.Array) -> jax.Array:
            x_LD, dy_LF = (jax.lax.dynamic_slice_in_dim(a, row, length) for a in (x_AD, dy_AF))
            return sum_DF + dot(jnp.where(is_own_L1, x_LD, 0), dy_LF)

        zeros_DF = jnp.zeros((x_AD.shape[1], dy_AF.shape[1]), jnp.float32)
        sum_DF = _over_blocks(add_block, zeros_DF, begin, end, length, num_rows)
        return None, sum_DF.astype(x_AD.dtype)

    def in_a_loop() -> jax.Array:
        return jax.lax.scan(of_group, None, _edges(sizes_E))[1]

    return _quickest(at_once, in_a_loop, sizes_E, length)


def _quickest(
    at_once: Callable[[], jax.Array],
    in_a_loop: Callable[[], jax.Array],
    sizes_E: jax.Array,
    length: int,
) -> jax.Array:
    """Returns the result of `at_once` if blocks are short and no group exceeds one."""
    if length > _FEW_ROWS:
        return in_a_loop()
    return jax.lax.cond(sizes_E.max() <= length, at_once, in_a_loop)


def _rows_of_groups(sizes_E: jax.Array, length: int, num_rows: int) -> jax.Array:
    """Returns the numbers of the rows (E, L) of each group; A where it has fewer."""
    begins_E, ends_E = _edges(sizes_E)
    rows_EL = begins_E[:, None] + jnp.arange(length)
    return jnp.where(rows_EL < ends_E[:, None], rows_EL, num_rows)


def _over_blocks(
    step: Callable[[T, jax.Array, jax.Array], T],
    initial: T,
    begin: jax.Array,
    end: jax.Array,
    length: int,
    num_rows: int,
) -> T:
    """Takes a step for each block of the rows from `begin` to `end`.

    A step is told where its block begins, and which of the rows are its own: a block in the end
    has others too, of the next group, or, as it must not go past the last row, done before.
    """

    def take_step(i: jax.Array, carry: T) -> T:
        first = begin + i * length
        row = jnp.minimum(first, num_rows - length)
        rows_L = row + jnp.arange(length)
        return step(carry, row, ((first <= rows_L) & (rows_L < end))[:, None])

    return jax.lax.fori_loop(0, -(-(end - begin) // length), take_step, initial)


def _block_length(x_AD: jax.Array, sizes_E: jax.Array) -> int:
    """Returns as many rows as few groups exceed if every row's group is drawn at random."""
    num_rows = x_AD.shape[0]
    mean = num_rows / sizes_E.shape[0]
    return min(num_rows, 8 * math.ceil((mean + 3 * math.sqrt(mean)) / 8))


def _edges(sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    ends_E = jnp.cumsum(sizes_E)
    return ends_E - sizes_E, ends_E
