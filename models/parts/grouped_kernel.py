"""The matmuls of grouped_dot as kernels for a GPU, in Triton through Pallas.

XLA's own ragged_dot multiplies, on a GPU, all rows by all matrices. Here a block of rows meets the
matrix of its own group alone: its rows end where the group ends, so there is one block more than
needed for each group at most.

Shapes: A rows, E groups, D width of a row, F width of a result, Z blocks of rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

NUM_WARPS, NUM_STAGES = 8, 3
WIDTH = 128
"""Columns of a tile; of rows it has as many, or fewer where groups are small."""
SMALLEST = 16  # side of a tile that tensor cores take


def multiply(
    x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """Returns every row times the matrix of its group, (A, F); that is (F, D) if `transposed`."""
    (A, D), E = x_AD.shape, sizes_E.shape[0]
    F = w_EDF.shape[1 if transposed else 2]
    length = min(WIDTH, max(SMALLEST, pl.next_power_of_2(math.ceil(A / E))))
    kernel = functools.partial(
        _multiply_block, length=length, depth=_depth(x_AD), transposed=transposed
    )
    blocks = _blocks(sizes_E, length, pl.cdiv(A, length) + E)
    y_AF = _call(
        kernel,
        grid=(blocks[0].size, pl.cdiv(F, WIDTH)),
        out=jax.ShapeDtypeStruct((A, F), x_AD.dtype),
        flops=2 * A * D * F,
    )(*blocks, x_AD, w_EDF)
    # Rows without a group were not written.
    return jnp.where(jnp.arange(A)[:, None] < sizes_E.sum(), y_AF, 0)


def contract(x_AD: jax.Array, dy_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns x^T dy over the rows of each group, (E, D, F)."""
    (A, D), F, E = x_AD.shape, dy_AF.shape[1], sizes_E.shape[0]
    ends_E = jnp.cumsum(sizes_E)
    return _call(
        functools.partial(_contract_group, depth=_depth(x_AD)),
        grid=(E, pl.cdiv(D, WIDTH), pl.cdiv(F, WIDTH)),
        out=jax.ShapeDtypeStruct((E, D, F), x_AD.dtype),
        flops=2 * A * D * F,
    )(ends_E - sizes_E, ends_E, x_AD, dy_AF)


def _call(kernel: Any, *, grid: tuple[int, ...], out: jax.ShapeDtypeStruct, flops: int) -> Any:
    def call(*args: jax.Array) -> jax.Array:
        types: list[Any] = [out, *args]
        num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in types)
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out,
            compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
            cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=num_bytes),
            interpret=jax.default_backend() == "cpu",  # for tests
        )(*args)

    return call


def _depth(x: jax.Array) -> int:
    """Returns how many products a tile adds up at a time."""
    return 128 // x.dtype.itemsize


def _blocks(sizes_E: jax.Array, length: int, num_blocks: int) -> tuple[jax.Array, ...]:
    """Returns the group of each block, its first row, and the end of its group.

    Blocks that are left over begin where their group ends.
    """
    ends_E = jnp.cumsum(sizes_E)
    last_E = jnp.cumsum(-(-sizes_E // length))
    index_Z = jnp.arange(num_blocks, dtype=sizes_E.dtype)
    group_Z = jnp.searchsorted(last_E, index_Z, side="right").clip(max=sizes_E.shape[0] - 1)
    before_Z = index_Z - (last_E[group_Z] - -(-sizes_E[group_Z] // length))
    row_Z = ends_E[group_Z] - sizes_E[group_Z] + before_Z * length
    return group_Z, jnp.minimum(row_Z, ends_E[group_Z]), ends_E[group_Z]


def _multiply_block(
    group_ref: Any,
    row_ref: Any,
    end_ref: Any,
    x_ref: Any,
    w_ref: Any,
    y_ref: Any,
    *,
    length: int,
    depth: int,
    transposed: bool,
) -> None:
    z, D, F = pl.program_id(0), x_ref.shape[1], y_ref.shape[1]
    group, rows_L = group_ref[z], row_ref[z] + jnp.arange(length)
    columns_W = pl.program_id(1) * WIDTH + jnp.arange(WIDTH)
    has_rows_L, has_columns_W = rows_L < end_ref[z], columns_W < F

    def add(k: jax.Array, sum_LW: jax.Array) -> jax.Array:
        inner_K = k * depth + jnp.arange(depth)
        x_LK = _load(x_ref, rows_L, inner_K, has_rows_L, inner_K < D)
        if transposed:
            w_WK = _load(w_ref, columns_W, inner_K, has_columns_W, inner_K < D, group)
            return sum_LW + triton.dot(x_LK, w_WK.T)
        w_KW = _load(w_ref, inner_K, columns_W, inner_K < D, has_columns_W, group)
        return sum_LW + triton.dot(x_LK, w_KW)

    sum_LW = jax.lax.fori_loop(0, pl.cdiv(D, depth), add, jnp.zeros((length, WIDTH), jnp.float32))
    _store(y_ref, sum_LW, rows_L, columns_W, has_rows_L, has_columns_W)


def _contract_group(
    begin_ref: Any, end_ref: Any, x_ref: Any, dy_ref: Any, dw_ref: Any, *, depth: int
) -> None:
    group, D, F = pl.program_id(0), x_ref.shape[1], dy_ref.shape[1]
    begin, end = begin_ref[group], end_ref[group]
    down_W = pl.program_id(1) * WIDTH + jnp.arange(WIDTH)
    across_W = pl.program_id(2) * WIDTH + jnp.arange(WIDTH)

    def add(k: jax.Array, sum_WW: jax.Array) -> jax.Array:
        rows_K = begin + k * depth + jnp.arange(depth)
        x_KW = _load(x_ref, rows_K, down_W, rows_K < end, down_W < D)
        dy_KW = _load(dy_ref, rows_K, across_W, rows_K < end, across_W < F)
        return sum_WW + triton.dot(x_KW.T, dy_KW)

    num_steps = (end - begin + depth - 1) // depth
    sum_WW = jax.lax.fori_loop(0, num_steps, add, jnp.zeros((WIDTH, WIDTH), jnp.float32))
    _store(dw_ref, sum_WW, down_W, across_W, down_W < D, across_W < F, group)


def _load(
    ref: Any, i: jax.Array, j: jax.Array, has_i: jax.Array, has_j: jax.Array, *group: jax.Array
) -> jax.Array:
    mask = has_i[:, None] & has_j[None, :]
    return triton.load(ref.at[*group, i[:, None], j[None, :]], mask=mask, other=0)


def _store(
    ref: Any,
    x: jax.Array,
    i: jax.Array,
    j: jax.Array,
    has_i: jax.Array,
    has_j: jax.Array,
    *group: jax.Array,
) -> None:
    mask = has_i[:, None] & has_j[None, :]
    triton.store(ref.at[*group, i[:, None], j[None, :]], x.astype(ref.dtype), mask=mask)
