"""The two parts of a backward give what it gives, and share its work."""

import collections

import jax
import jax.numpy as jnp
import pytest

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.split_backward import held_for_kept_bytes, split_backward
from passes.stages import Role
from tests.passes.on_host import assert_bitwise, layers_of, random_boundaries, run_gradient
from tests.passes.small_models import MODELS, array, blocks, case, mlp, norm
from tests.passes.test_differentiate import HEAVY


def stages_and_gradients(name, seed, *, recompute="cheap"):
    graph = case(name).graph
    stages = cut_stages(graph, random_boundaries(len(graph.layers), seed))
    return stages, differentiate(stages, recompute=[recompute] * len(stages.stages))


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_parts_and_whole_are_equal(name, seed, recompute):
    """Bitwise: the equations are the same, whichever program they are in."""
    c = case(name)
    plain = run_gradient(*stages_and_gradients(name, seed), c.params, c.batch)
    stages, gradients = stages_and_gradients(name, seed, recompute=recompute)
    everything = range(len(stages.stages))
    split = run_gradient(stages, gradients, c.params, c.batch, split=everything)
    for got, want in zip(split, plain, strict=True):
        assert_bitwise(got, want)


def counts(*programs):
    found = collections.Counter()
    for program in programs:
        if program is not None:
            found.update(jaxprs.count_primitives(program.jaxpr))
    return found


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_heavy_is_computed_twice(name, recompute):
    c = case(name)
    activations = jaxprs.dependents(c.graph.program.jaxpr, c.graph.program.param_vars)
    # What the batch alone gives (masks, rotary tables) may be computed again.
    from_batch = {
        eqn.primitive.name
        for eqn in c.graph.program.jaxpr.eqns
        if activations.isdisjoint(eqn.outvars)
    }
    for gradient in stages_and_gradients(name, 0, recompute=recompute)[1]:
        split = split_backward(gradient.backward)
        parts, whole = counts(split.input_grad, split.weight_grad), counts(gradient.backward)
        for primitive in set(HEAVY) - (from_batch - {"dot_general"}):
            assert parts[primitive] == whole[primitive], primitive


@pytest.mark.parametrize("name", MODELS)
def test_each_part_writes_its_own(name):
    for gradient in stages_and_gradients(name, 0)[1]:
        split = split_backward(gradient.backward)
        kept = set()
        if split.input_grad is not None:
            kept = {x for x in split.input_grad.writes if x.role == Role.KEPT}
            assert not [x for x in split.input_grad.writes if x.role == Role.SUM]
            assert not [x for x in split.input_grad.reads if x.role == Role.SUM]
        if split.weight_grad is not None:
            assert {x.role for x in split.weight_grad.writes} == {Role.SUM}
            assert {x for x in split.weight_grad.reads if x.role == Role.KEPT} == kept
            # The sums stand last, so that they are donated before anything of their type.
            first = next(i for i, x in enumerate(split.weight_grad.reads) if x.role == Role.SUM)
            assert {x.role for x in split.weight_grad.reads[first:]} == {Role.SUM}


def test_the_first_stage_has_weights_only_and_a_stage_without_weights_inputs_only():
    _, gradients = stages_and_gradients("residual", 0)
    split = split_backward(gradients[0].backward)
    assert split.input_grad is None and split.weight_grad is gradients[0].backward
    graph = layers_of(
        lambda p, x: jnp.sum(jnp.sin(jax.lax.stop_gradient(p[1]) @ jnp.sin(p[0] @ x))),
        [array(8, 8), array(8, 8)],
        array(8, 2),
    )
    last = differentiate(cut_stages(graph, range(len(graph.layers) + 1)))[-1]
    split = split_backward(last.backward)
    assert split.weight_grad is None and split.input_grad is last.backward


def test_what_follows_cheaply_from_saved_values_is_not_kept():
    """Of a gated block, the weight gradients need the products, which its saved factors give."""
    params = {"in": array(8, 8), "up": array(8, 32), "gate": array(8, 32), "down": array(32, 8)}

    def loss(p, x):
        x = x @ p["in"]
        return jnp.sum(((x @ p["up"]) * (x @ p["gate"])) @ p["down"])

    graph = layers_of(loss, params, array(2, 8))
    gradient = differentiate(cut_stages(graph, [0, 1, len(graph.layers)]))[-1]
    split = split_backward(gradient.backward)
    # The gradients of the three matmuls' results; nothing of the forward.
    kept = sorted(a.shape for a in split.input_grad.avals_of(Role.KEPT))
    assert kept == [(2, 8), (2, 32), (2, 32)]


def test_a_recomputed_stage_saves_nothing():
    for name in MODELS:
        stages, gradients = stages_and_gradients(name, 0, recompute="all")
        for stage, gradient in zip(stages.stages, gradients, strict=True):
            assert not gradient.forward.avals_of(Role.SAVED)
            inputs = {x.index for x in gradient.backward.reads if x.role == Role.CROSSING}
            assert inputs <= set(stage.inputs)


def test_the_backward_of_a_checkpoint_is_split_too():
    params = {**blocks(), "head": array(8, 3)}

    def loss(p, x):
        x = x @ p["block0"]["up"] @ p["block0"]["down"]
        for i in range(4):
            x = x + jax.checkpoint(mlp)(p[f"block{i}"], x)
        return jnp.mean(x @ p["head"])

    graph = layers_of(loss, params, array(2, 8))
    stages = cut_stages(graph, [0, 3, len(graph.layers)])
    gradient = differentiate(stages)[1]
    split = split_backward(gradient.backward)
    matmuls = [counts(p)["dot_general"] for p in (split.input_grad, split.weight_grad)]
    # Three blocks and the head: seven matmuls, each with two gradients; the first matmul of a
    # block is run again (the second's result is not needed).
    assert matmuls == [7 + 3, 7]
    assert counts(gradient.backward)["dot_general"] == sum(matmuls)


ROWS, WIDTH, HIDDEN = 64, 8, 32


def gated(num_blocks):
    """Return the split backward of blocks that read their norm twice, as a stage of their own."""
    one = {
        "scale": array(WIDTH),
        "up": array(WIDTH, HIDDEN),
        "gate": array(WIDTH, HIDDEN, seed=1),
        "down": array(HIDDEN, WIDTH),
    }
    params = {"in": array(WIDTH, WIDTH), "blocks": [one] * num_blocks, "head": array(WIDTH, 3)}

    def loss(params, x):
        x = x @ params["in"]
        for p in params["blocks"]:
            h = norm(x, p["scale"])
            x = x + ((h @ p["up"]) * (h @ p["gate"])) @ p["down"]
        return jnp.mean((x @ params["head"]) ** 2)

    graph = layers_of(loss, params, array(ROWS, WIDTH))
    gradients = differentiate(cut_stages(graph, [0, 1, 1 + num_blocks, len(graph.layers)]))
    return split_backward(gradients[1].backward)


def test_what_is_held_for_a_sum_that_is_kept():
    """The gradient of the norm is the sum of two matmuls; I keeps it for the norm's scale."""
    assert held_for_kept_bytes(gated(1)) == 4 * ROWS * WIDTH * (2 - 1)
    assert held_for_kept_bytes(gated(3)) == 3 * held_for_kept_bytes(gated(1))


def test_a_gradient_of_one_matmul_holds_nothing_more():
    graph = layers_of(
        lambda p, x: jnp.mean((x @ p["in"] + mlp(p, x @ p["in"])) ** 2),
        {"in": array(8, 8), **blocks()["block0"]},
        array(4, 8),
    )
    gradient = differentiate(cut_stages(graph, [0, 1, len(graph.layers)]))[1]
    assert split_backward(gradient.backward).weight_grad is not None
    assert held_for_kept_bytes(split_backward(gradient.backward)) == 0
