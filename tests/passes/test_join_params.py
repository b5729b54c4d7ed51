"""Slices that only one layer reads are a whole parameter again."""

import jax.numpy as jnp
import pytest

from passes.join_params import join_params
from tests.passes.on_host import assert_bitwise, layers_of, program_of, run_program
from tests.passes.small_models import array

WIDTH = 4
PARAMS = {"b": array(5), "stack": array(3, WIDTH, WIDTH), "taps": array(WIDTH, 2)}
BATCH = array(2, WIDTH)


def loss(p, x):
    """Three layers of a stack; the first also reads its taps one by one."""
    x = x @ p["stack"][0] * p["taps"][:, 0] + p["taps"][:, 1]
    for w in (p["stack"][1], p["stack"][2]):
        x = jnp.sin(x) @ w
    return jnp.sum(x) * jnp.sum(p["b"])


@pytest.fixture(scope="module")
def program():
    return program_of(loss, PARAMS, BATCH)


def test_all_are_split_before(program):
    assert program.params == ("b", "stack[0]", "stack[1]", "stack[2]", "taps[:,0]", "taps[:,1]")


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        ([{0, 1, 2, 3, 4, 5}], ("b", "stack", "taps")),
        ([{1, 4, 5}, {2}, {0, 3}], ("b", "stack[0]", "stack[1]", "stack[2]", "taps")),
        ([{1, 4}, {2, 5}, {3}], None),
        # Nobody reads the others: they are where the one is that somebody reads.
        ([{0, 2}], ("b", "stack", "taps")),
    ],
)
def test_what_is_read_together_is_whole(program, read, wanted):
    joined = join_params(program, read)
    if wanted is None:
        assert joined is program
    else:
        assert joined.params == wanted
    joined.check()
    assert_bitwise(run_program(joined, PARAMS, BATCH), run_program(program, PARAMS, BATCH))
    assert join_params(joined, [range(len(joined.params))] * 2) is joined


def test_layers_of_a_stack_stay_apart_and_taps_together():
    graph = layers_of(loss, PARAMS, BATCH)
    assert graph.program.params == ("b", "stack[0]", "stack[1]", "stack[2]", "taps")
    names = [[graph.program.params[p] for p in layer.params] for layer in graph.layers]
    assert names == [["stack[0]", "taps"], ["stack[1]"], ["b", "stack[2]"]]
