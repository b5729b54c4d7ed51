import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.parts import grouped_kernel
from models.parts.grouped_dot import grouped_dot

# As many as a block of 16 and more, groups without rows, all rows in one group, a row without one.
SIZES = [
    (7, 3, 4, 6),
    (0, 20, 0, 0),
    (0, 0, 0, 20),
    (1, 0, 19, 0),
    (13, 0, 6, 0),
    (1, 0, 0, 0),
    (0, 0, 0, 1),
]


def inputs(sizes, num_rows, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=s).astype(dtype) for s in ((num_rows, 5), (4, 5, 3), (num_rows, 3)))
    return x, w, np.array(sizes, np.int32), dy


def one_group_after_the_other(x, w, sizes, dy):
    """The product and its gradients, in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for e, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[e], end)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    return y, dx, dw


def product_and_gradients(x, w, sizes, dy):
    y, pullback = jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)
    return y, *pullback(dy)


@pytest.mark.parametrize("num_rows", [20, 23])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_product_and_its_gradients_are_those_of_every_group(sizes, num_rows):
    case = inputs(sizes, num_rows)
    found = jax.jit(product_and_gradients)(*case)
    for ours, expected in zip(found, one_group_after_the_other(*case), strict=True):
        # The same sums in float32.
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_many_rows_have_the_product_and_gradients_of_few():
    case = inputs((0, 7, 90, 3), 101)  # in blocks of 48
    found = jax.jit(product_and_gradients)(*case)
    for ours, expected in zip(found, one_group_after_the_other(*case), strict=True):
        # The same sums in float32, of up to 90 terms.
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [20, 23])
@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_for_a_gpu_give_the_same(sizes, num_rows):
    x, w, sizes, dy = case = inputs(sizes, num_rows)
    found = (
        grouped_kernel.multiply(x, w, sizes),
        grouped_kernel.multiply(dy, w, sizes, transposed=True),
        grouped_kernel.contract(x, dy, sizes),
    )
    for ours, expected in zip(found, one_group_after_the_other(*case), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_kernels_of_several_blocks_and_tiles():
    rng = np.random.default_rng(0)
    shapes = (300, 140), (3, 140, 150), (300, 150)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    sizes = np.array([170, 0, 130], np.int32)
    found = (
        grouped_kernel.multiply(x, w, sizes),
        grouped_kernel.multiply(dy, w, sizes, transposed=True),
        grouped_kernel.contract(x, dy, sizes),
    )
    for ours, expected in zip(found, one_group_after_the_other(x, w, sizes, dy), strict=True):
        # Sums of 170 products in float32, in another order.
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_single_row_has_a_product_and_gradients():
    case = inputs((0, 0, 1, 0), 1)
    found = jax.jit(product_and_gradients)(*case)
    for ours, expected in zip(found, one_group_after_the_other(*case), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_products_in_16_bits_have_gradients_in_16_bits():
    case = inputs(SIZES[0], 20, jnp.bfloat16)
    found = jax.jit(product_and_gradients)(*case)
    for ours, expected in zip(found, one_group_after_the_other(*case), strict=True):
        assert ours.dtype == jnp.bfloat16
        # bfloat16 rounds to 0.4 percent, what is added up and the sum.
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0.02, atol=0.02)


def test_no_array_is_made_of_every_row_with_every_group():
    num_rows, num_groups, width = 512, 16, 32
    avals = (
        jax.ShapeDtypeStruct((num_rows, width), jnp.float32),
        jax.ShapeDtypeStruct((num_groups, width, width), jnp.float32),
        jax.ShapeDtypeStruct((num_groups,), jnp.int32),
        jax.ShapeDtypeStruct((num_rows, width), jnp.float32),
    )
    memory = jax.jit(product_and_gradients).lower(*avals).compile().memory_analysis()
    # Beside what is given and returned, less than one copy of both.
    assert memory.temp_size_in_bytes < 4 * width * (2 * num_rows + num_groups * width)
