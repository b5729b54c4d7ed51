"""Shares of layers in the loss are added as they are made, and cross with the activations."""

import jax
import jax.numpy as jnp

from passes import jaxprs
from passes.add_early import add_early
from passes.cut_stages import cut_stages
from passes.layers import find_layers
from passes.trace import trace
from tests.passes.on_host import assert_bitwise, types
from tests.passes.small_models import array

PARAMS = {
    "in": array(8, 8),
    "blocks": [{"up": array(8, 32, seed=k), "down": array(32, 8)} for k in range(4)],
}
BATCH = {"x": array(6, 8)}


def loss_fn(p, batch):
    x, shares = batch["x"] @ p["in"], []
    for block in p["blocks"]:
        hidden = jnp.tanh(x @ block["up"])
        shares.append((hidden**2).mean())
        x = x + hidden @ block["down"]
    return (x**2).mean() + 0.1 * sum(shares)


def program_of(loss):
    return trace(loss, types(PARAMS), types(BATCH), has_aux=False)[0]


def run(program):
    args = [*jax.tree.leaves(PARAMS), *jax.tree.leaves(BATCH)]
    return jax.jit(lambda *args: jaxprs.evaluate(program.jaxpr, args))(*args)


def crossings(program):
    """Return the stages between which scalars cross, if every layer is a stage."""
    graph = find_layers(program)
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    return [(c.producer, *c.consumers) for c in stages.crossings if not c.aval.shape]


def test_a_layer_hands_on_the_sum_so_far():
    before = program_of(loss_fn)
    after = add_early(before)
    # The last layer makes the loss, and each before it has a share, but for the one of the input.
    last = len(find_layers(before).layers) - 1
    assert last >= len(PARAMS["blocks"])
    assert crossings(before) == [(layer, last) for layer in range(1, last)]
    assert crossings(after) == [(layer, layer + 1) for layer in range(1, last)]
    assert_bitwise(run(after), run(before))


def test_nothing_else_moves():
    def loss(p, batch):
        y = batch["x"] @ p["in"]
        z = jnp.exp(y.sum())
        w = jnp.sin(y) @ p["blocks"][0]["up"]
        return z * w.sum() + jnp.log(z)

    before = program_of(loss)
    names = [eqn.primitive.name for eqn in add_early(before).jaxpr.eqns]
    assert names == [eqn.primitive.name for eqn in before.jaxpr.eqns]
