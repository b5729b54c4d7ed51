import itertools

import jax
import jax.numpy as jnp
import pytest

from models.parts import grouped_kernel
from passes import jaxprs
from tests.passes.on_host import count_layers, layers_of
from tests.passes.small_models import array, transformer


def chain(widths, size):
    """Return the layers of a chain of matmuls, x @ w0 @ w1 ..., on a batch of `size`."""
    params = {f"w{i}": array(a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))}

    def loss(p, x):
        for w in p.values():
            x = x @ w
        return x.sum()

    return layers_of(loss, params, array(size, widths[0]))


def test_the_work_of_matmuls():
    size, widths = 6, (5, 7, 11, 13, 3)
    work = count_layers(chain(widths, size))
    for index, (a, b) in enumerate(itertools.pairwise(widths)):
        matmul = 2 * size * a * b
        is_first, is_last = index == 0, index == len(work) - 1
        # The sum of the loss: one addition less than its terms, and XLA starts from zero.
        in_loss = size * b if is_last else 0
        assert work[index].forward.flops - matmul in ((in_loss - 1, in_loss) if is_last else (0,))
        # The gradients of parameters and, but for the first layer, inputs; each is added to a sum.
        assert work[index].backward.flops == (1 if is_first else 2) * matmul + a * b
        assert work[index].input_grad.flops == (0 if is_first else matmul)
        assert work[index].weight_grad.flops == matmul + a * b


def test_bytes_of_matmuls():
    size, widths = 6, (5, 7, 11, 13, 3)
    _, second, *_ = count_layers(chain(widths, size))
    operands = 4 * (size * 7 + 7 * 11 + size * 11)
    assert second.forward.bytes_accessed == operands
    assert second.backward.bytes_accessed >= 2 * operands - 4 * size * 11


def recurrent(length, unroll=1, repeats=1):
    """Return the work of a layer that runs over time, `repeats` times, between two others."""
    params = {"in": array(4, 16), "loop": array(16, 16), "out": array(16, 4)}

    def loss(p, x):
        def step(h, x_t):
            h = jnp.tanh(h @ p["loop"] + x_t)
            return h, h

        def run(h, _):
            return jax.lax.scan(step, h, jnp.ones((length, 8, 16)), unroll=unroll)[0], None

        h = x @ p["in"]
        h = run(h, None)[0] if repeats == 1 else jax.lax.scan(run, h, length=repeats)[0]
        return (h @ p["out"]).sum()

    return count_layers(layers_of(loss, params, array(8, 4)))[1]


@pytest.mark.parametrize("part", ["forward", "backward", "input_grad"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_each_iteration_of_a_scan_counts(part, unroll):
    few, many = (getattr(recurrent(length, unroll), part) for length in (10, 1000))
    # What is outside of the loop is as much for both.
    assert 90 * few.flops <= many.flops <= 101 * few.flops
    # Iterations that XLA unrolls share what they read.
    assert 50 * few.bytes_accessed <= many.bytes_accessed <= 110 * few.bytes_accessed
    assert many.flops >= 1000 * 2 * 8 * 16 * 16  # a matmul an iteration


def test_a_scan_in_a_scan():
    once, thrice = recurrent(20), recurrent(20, repeats=3)
    assert 2.8 * once.forward.flops <= thrice.forward.flops <= 3.2 * once.forward.flops
    assert thrice.backward.flops >= 2.8 * once.backward.flops


def row_by_row(length):
    """Return the work of a layer that goes through `length` rows of 64, between two others."""
    params = {"in": array(4, 64), "loop": array(64, 64), "out": array(64, 4)}

    def loss(p, x):
        x = x @ p["in"]

        def step(done, row):
            y = jax.lax.dynamic_slice_in_dim(jax.lax.stop_gradient(x), row, 1) @ p["loop"]
            return jax.lax.dynamic_update_slice_in_dim(done, y, row, 0), None

        done = jax.lax.scan(step, jnp.zeros_like(x), jnp.arange(length))[0]
        return ((x + done) @ p["out"]).sum()

    return count_layers(layers_of(loss, params, array(length, 4)))[1]


def test_an_iteration_reads_and_writes_one_row():
    """Of an array that it slices and one that it updates, however many rows these have."""
    length, row, matrix = 4096, 4 * 64, 4 * 64 * 64
    forward = row_by_row(length).forward
    least = length * (matrix + 2 * row)  # the matrix, a row in, a row out
    assert forward.flops >= 2 * length * 64 * 64
    # A row is copied, put in its place, taken out again; whole arrays are read and written thrice.
    assert least <= forward.bytes_accessed <= least + length * 8 * row + 6 * length * row


@pytest.fixture
def compilations(compilations, monkeypatch):
    """With nothing counted yet."""
    monkeypatch.setattr("passes.work._counted", {})
    return compilations


def test_equal_layers_are_compiled_once(compilations):
    work = count_layers(transformer(5))
    assert len(work) == 7
    # A block and the head: forward, what is run again of it, backward and its two parts. The
    # embedding saves nothing, and has no input to give a gradient to: its backward is its weight
    # gradient.
    assert len(compilations) == 2 * 5 + 2
    assert len({w.forward for w in work[1:-1]}) == 1
    assert len({w.backward for w in work[1:-1]}) == 1
    # Nor are those of another model, or of the same once more.
    assert count_layers(transformer(5)) == work
    assert len(count_layers(transformer(3))) == 5
    assert len(compilations) == 2 * 5 + 2


def test_layers_of_other_widths_are_not_equal(compilations):
    count_layers(chain((4, 4, 5, 5, 4), 2))
    assert len(compilations) == 2 + 3 * 4


def test_what_a_gpu_has_libraries_for_is_counted_as_xla_counts_it_elsewhere():
    def matmuls(x, w, kernel):
        return jnp.einsum("bij,jk->bik", x, w), jax.lax.conv(x[:, None], kernel, (1, 1), "VALID")

    args = [jnp.zeros(shape) for shape in ((3, 16, 8), (8, 5), (6, 1, 4, 3))]
    jaxpr = jax.make_jaxpr(matmuls)(*args).jaxpr
    counts = [jaxprs.library_work(eqn) for eqn in jaxprs.equations(jaxpr)]
    counted = jax.jit(matmuls).lower(*args).compile().cost_analysis()
    assert sum(flops for flops, _ in counts) == counted["flops"]
    (matmul_bytes, convolution_bytes) = (num_bytes for _, num_bytes in counts if num_bytes)
    assert matmul_bytes == 4 * (3 * 16 * 8 + 8 * 5 + 3 * 16 * 5)
    assert convolution_bytes == 4 * (3 * 16 * 8 + 6 * 4 * 3 + 3 * 6 * 13 * 6)


def test_a_kernel_counts_as_the_matmul_that_it_does():
    args = jnp.zeros((32, 8)), jnp.zeros((4, 8, 5)), jnp.full(4, 8)
    jaxpr = jax.make_jaxpr(grouped_kernel.multiply)(*args).jaxpr
    counts = [jaxprs.library_work(eqn) for eqn in jaxprs.equations(jaxpr)]
    assert sum(flops for flops, _ in counts) == 2 * 32 * 8 * 5
