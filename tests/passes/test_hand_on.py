"""What skips stages goes through all of them, and nothing else changes."""

import jax
import jax.numpy as jnp
import pytest

from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.hand_on import hand_on
from tests.passes.on_host import assert_bitwise, layers_of, run_forward, run_gradient
from tests.passes.small_models import array
from tests.small_models import assert_close

NUM_BLOCKS = 6
PARAMS = {
    "in": array(8, 8),
    "blocks": [{"up": array(8, 32, seed=k), "down": array(32, 8)} for k in range(NUM_BLOCKS)],
}
BATCH = {"x": array(6, 8)}


def loss_fn(p, batch):
    """Blocks 0 and 3 have a share in the loss; what block 0 counts, block 4 reads."""
    x, shares = batch["x"] @ p["in"], []
    for k, block in enumerate(p["blocks"]):
        hidden = jnp.tanh(x @ block["up"])
        if k == 0:
            num_positive = (hidden > 0).sum().astype(jnp.float32)
        if k in (0, 3):
            shares.append((hidden**2).mean())
        if k == 4:
            hidden = hidden / (1 + num_positive)
        x = x + hidden @ block["down"]
    return (x**2).mean() + 0.1 * sum(shares)


@pytest.fixture(scope="module")
def graph():
    return layers_of(loss_fn, PARAMS, BATCH)


def cut(graph, per_stage):
    num_layers = len(graph.layers)
    return cut_stages(graph, [*range(0, num_layers, per_stage), num_layers])


def check(before, after):
    assert all(c.consumers == (c.producer + 1,) for c in after.crossings)
    assert len(after.crossings) == num_steps(before.crossings)


def num_steps(crossings):
    return sum(c.consumers[-1] - c.producer for c in crossings)


def scalars(stages):
    return [c for c in stages.crossings if not c.aval.shape]


@pytest.mark.parametrize(("per_stage", "num_skipping"), [(1, 3), (2, 2)])
def test_scalars_go_to_the_next_stage_only(graph, per_stage, num_skipping):
    before = cut(graph, per_stage)
    after = hand_on(before)
    # The sum after block 0, what block 4 reads and, if block 3 is not in the last stage but one,
    # the sum after it.
    assert sum(c.consumers[-1] > c.producer + 1 for c in scalars(before)) == num_skipping
    assert len(scalars(after)) == num_steps(scalars(before))
    check(before, after)


def gradient(stages, recompute="cheap"):
    gradients = differentiate(stages, recompute=[recompute] * len(stages.stages))
    split = range(0, len(gradients), 2)
    return run_gradient(stages, gradients, PARAMS, BATCH, split=split)


@pytest.mark.parametrize("per_stage", [1, 2])
def test_results_and_gradients_stay(graph, per_stage):
    before = cut(graph, per_stage)
    after = hand_on(before)
    assert_bitwise(run_forward(after, PARAMS, BATCH)[0], run_forward(before, PARAMS, BATCH)[0])
    (loss, sums), (plain_loss, plain_sums) = gradient(after), gradient(before)
    assert_bitwise(loss, plain_loss)
    assert_bitwise(sums, plain_sums)


def test_if_nothing_skips_a_stage_nothing_changes(graph):
    stages = cut_stages(graph, [0, len(graph.layers)])
    assert hand_on(stages) == stages


@pytest.mark.parametrize("recompute", ["all", "cheap", "none"])
@pytest.mark.parametrize("per_stage", [1, 2])
def test_arrays_go_to_the_next_stage_only(per_stage, recompute):
    """Read in between, too; without a gradient of all or of some readers; and no numbers."""

    def loss(p, batch):
        first = x = batch["x"] @ p["in"]
        positive = first > 0
        for k, block in enumerate(p["blocks"]):
            x = jnp.tanh(x @ block["up"]) @ block["down"]
            if k == 0:
                second = x
            if k == 3:
                x = jnp.where(positive, x + first, x) * second
        return (x * jax.lax.stop_gradient(first + second)).mean()

    before = cut(layers_of(loss, PARAMS, BATCH), per_stage)
    skip = [c for c in before.crossings if c.consumers[-1] > c.producer + 1]
    assert {c.has_gradient for c in skip} == {False, True} and len(skip) > 2
    after = hand_on(before)
    check(before, after)
    assert_close(gradient(after, recompute), gradient(before, recompute), rtol=1e-6)
