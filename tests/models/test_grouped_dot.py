import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.parts import grouped_kernel
from models.parts.grouped_dot import arrange, grouped_dot

# As many as a block of 16 and more, groups without rows, all rows in one group, a single row.
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


def product_and_gradients(x, w, group, dy):
    def product(x, w):
        places = arrange(group, len(w))
        x = x.at[places.row_S].get(mode="fill", fill_value=0)
        return grouped_dot(x, w, places.sizes_E)[places.place_A]

    y, pullback = jax.vjp(product, x, w)
    return y, *pullback(dy)


def compare_with_float64(sizes, dtype=np.float32, **tolerance):
    """Compares all, where rows come in the order of their groups and in another."""
    x, w, _, dy = inputs(sizes, sum(sizes), dtype)
    expected = one_group_after_the_other(x, w, sizes, dy)
    group = np.repeat(np.arange(len(sizes)), sizes)
    for order in (np.arange(sum(sizes)), np.random.default_rng(1).permutation(sum(sizes))):
        y, dx, dw = jax.jit(product_and_gradients)(x[order], w, group[order], dy[order])
        assert y.dtype == dx.dtype == dw.dtype == dtype
        found = np.zeros_like(expected[0]), np.zeros_like(expected[1]), np.asarray(dw, np.float64)
        found[0][order], found[1][order] = y, dx
        for ours, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, other, **tolerance)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_product_and_its_gradients_are_those_of_every_group(sizes):
    # The same sums in float32.
    compare_with_float64(sizes, rtol=1e-5, atol=1e-5)


# The blocks have 48 rows, which the first fill, and of which the others need two.
@pytest.mark.parametrize("sizes", [(20, 48, 30, 2), (0, 7, 90, 3), (51, 0, 0, 49)])
def test_many_rows_have_the_product_and_gradients_of_few(sizes):
    # The same sums in float32, of up to 90 terms.
    compare_with_float64(sizes, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [*SIZES, (20, 48, 30, 2), (51, 0, 0, 49)])
def test_every_row_has_a_place_of_its_own_among_those_of_its_group(sizes):
    num_rows = sum(sizes)
    group = np.random.default_rng(0).permutation(np.repeat(np.arange(4), sizes))
    places = jax.jit(lambda group: vars(arrange(group, 4)))(group)
    np.testing.assert_array_equal(places["sizes_E"], sizes)
    np.testing.assert_array_equal(places["row_S"][places["place_A"]], np.arange(num_rows))
    assert (np.asarray(places["row_S"]) == num_rows).sum() == places["row_S"].size - num_rows
    length = places["row_S"].size // 4
    begins = np.arange(4) * length if max(sizes) <= length else np.cumsum(sizes) - sizes
    within = places["place_A"] - begins[group]
    assert ((within >= 0) & (within < np.array(sizes)[group])).all()


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


def test_products_in_16_bits_have_gradients_in_16_bits():
    for sizes in SIZES[:2]:
        # bfloat16 rounds to 0.4 percent, what is added up and the sum.
        compare_with_float64(sizes, jnp.bfloat16, rtol=0.02, atol=0.02)


def test_no_array_is_made_of_every_row_with_every_group():
    num_groups, width = 16, 32
    places = jax.eval_shape(lambda group: vars(arrange(group, num_groups)), np.arange(512) % 16)
    num_places = places["row_S"].size
    rows_SD = jax.ShapeDtypeStruct((num_places, width), jnp.float32)
    w_EDF = jax.ShapeDtypeStruct((num_groups, width, width), jnp.float32)

    @jax.jit
    def product_and_gradients(x_SD, w_EDF, sizes_E, dy_SF):
        y_SF, pullback = jax.vjp(lambda x, w: grouped_dot(x, w, sizes_E), x_SD, w_EDF)
        return y_SF, *pullback(dy_SF)

    program = product_and_gradients.lower(rows_SD, w_EDF, places["sizes_E"], rows_SD)
    temporary = program.compile().memory_analysis().temp_size_in_bytes
    # Beside what is given and returned, less than one copy of both.
    assert temporary < 4 * width * (2 * 512 + num_groups * width)
    # Of places there are less than twice as many as rows.
    assert num_places < 2 * 512
