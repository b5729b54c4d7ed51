import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.hoist import hoist
from passes.trace import trace
from tests.passes.on_host import assert_bitwise, layers_of, run_gradient, run_program, types
from tests.passes.small_models import array

WIDTH, LENGTH, NUM_BLOCKS = 8, 6, 3
BATCH = {"x": array(2, LENGTH, WIDTH), "length": jnp.array([3, 6])}


def block(p, x, bias):
    """An attention whose bias is made by the first block, and returned to the others."""
    if bias is None:
        distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
        bias = p["table"][jnp.abs(distance)]
    scores = jnp.einsum("BTD,BSD->BTS", x @ p["query"], x) + bias
    return x + jax.nn.softmax(scores) @ x @ p["out"], bias


def params():
    weights = {f"block{i}": {"query": array(8, 8, seed=i), "out": array(8, 8)} for i in range(3)}
    weights["block0"]["table"] = array(LENGTH)
    return {"in": array(WIDTH, WIDTH), **weights}


def masked_loss(p, batch):
    """The bias is a parameter's or, by a mask of the batch, none: light, so no activation."""

    def masked(p, x, bias):
        x, bias = block(p, x, bias)
        return x, jnp.where(jnp.arange(LENGTH) < batch["length"][:, None, None], bias, -1e9)

    x, bias = jax.checkpoint(masked, static_argnums=2)(p["block0"], batch["x"] @ p["in"], None)
    for i in (1, 2):
        x, bias = jax.checkpoint(block)(p[f"block{i}"], x, bias)
    return (x**2).mean()


def plain_loss(p, batch):
    """The bias depends on a parameter only."""
    x, bias = batch["x"] @ p["in"], None
    for i in range(NUM_BLOCKS):
        wrapped = jax.checkpoint(block, static_argnums=() if i else (2,))
        x, bias = wrapped(p[f"block{i}"], x, bias)
    return (x**2).mean()


def carried_loss(p, batch):
    """A third result is an activation, and stays."""

    def step(p, x):
        y, bias = block(p, x, p.get("table", 0.0))
        return y, bias, y.sum()

    x, bias, first = jax.checkpoint(step)(p["block0"], batch["x"] @ p["in"])
    x, _, second = jax.checkpoint(step)(p["block1"], x + bias[:, None])
    return (x**2).mean() + (first * second) ** 2


LOSSES = [masked_loss, plain_loss, carried_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_results_are_the_same(loss):
    program, _ = trace(loss, types(params()), types(BATCH), has_aux=False)
    hoisted = hoist(program)
    assert hoist(hoisted) is hoisted
    assert_bitwise(run_program(hoisted, params(), BATCH), run_program(program, params(), BATCH))


@pytest.mark.parametrize(
    ("loss", "results"), [(masked_loss, [1] * 3), (plain_loss, [1] * 3), (carried_loss, [2, 2])]
)
def test_remat_returns_activations_only(loss, results):
    program = hoist(trace(loss, types(params()), types(BATCH), has_aux=False)[0])
    remats = [e for e in program.jaxpr.eqns if e.primitive.name == "remat2"]
    assert [len(e.outvars) for e in remats] == results


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_the_bias_is_not_sent_and_its_table_has_a_gradient(loss):
    graph = layers_of(loss, params(), BATCH)
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    sent = [(c.producer, c.consumers) for c in stages.crossings]
    assert sent == [(i, (i + 1,)) for i in range(NUM_BLOCKS)]
    table = stages.program.params.index("block0/table")
    assert [table in stage.params for stage in stages.stages] == [False, True, True, True]
    _, sums = run_gradient(stages, differentiate(stages), params(), BATCH)
    want = jax.tree.leaves(jax.grad(loss)(params(), BATCH))
    assert np.any(want[table])
    for got, expected in zip(sums, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_remat_of_activations_only_is_left_alone():
    def loss(p, x):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p, x).sum()

    program, _ = trace(loss, types(array(4, 4)), types(array(2, 4)), has_aux=False)
    assert hoist(program) is program
    assert jaxprs.count_primitives(program.jaxpr)["remat2"] == 1
