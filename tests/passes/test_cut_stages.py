import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from tests.passes.on_host import (
    assert_bitwise,
    layers_of,
    random_boundaries,
    run_forward,
    run_gradient,
    run_program,
)
from tests.passes.small_models import MODELS, array, blocks, case, mlp, tokens

BOUNDARIES = [(name, seed) for name in MODELS for seed in range(3)]


def random_stages(name, seed):
    graph = case(name).graph
    return cut_stages(graph, random_boundaries(len(graph.layers), seed))


def every_layer_a_stage(graph):
    return cut_stages(graph, range(len(graph.layers) + 1))


def groups(stage):
    """Return the constants, parameters, batch leaves and inputs of the forward."""
    counts = (len(stage.constants), len(stage.params), len(stage.batch), len(stage.inputs))
    rest = iter(stage.forward.invars)
    return [[next(rest) for _ in range(count)] for count in counts]


def counts(stage):
    return jaxprs.count_primitives(stage.forward)


@pytest.mark.parametrize(("name", "seed"), BOUNDARIES)
def test_stages_in_order_equal_the_program(name, seed):
    c = case(name)
    stages = random_stages(name, seed)
    results, _ = run_forward(stages, c.params, c.batch)
    assert_bitwise(results, run_program(c.graph.program, c.params, c.batch))


@pytest.mark.parametrize("name", MODELS)
def test_one_stage_is_the_program(name):
    c = case(name)
    stages = cut_stages(c.graph, [0, len(c.graph.layers)])
    (stage,) = stages.stages
    assert not stages.crossings
    assert counts(stage) == jaxprs.count_primitives(c.graph.program.jaxpr)
    assert stage.params == tuple(range(len(c.graph.program.params)))


@pytest.mark.parametrize(("name", "seed"), BOUNDARIES)
def test_a_value_crosses_from_its_producer_to_each_reader(name, seed):
    stages = random_stages(name, seed)
    for index, crossing in enumerate(stages.crossings):
        assert list(crossing.consumers) == sorted(set(crossing.consumers))
        assert crossing.producer < crossing.consumers[0]
        holders = [s for s, stage in enumerate(stages.stages) if index in stage.inputs]
        assert holders == list(crossing.consumers)
        assert [s for s, x in enumerate(stages.stages) if index in x.outputs] == [crossing.producer]
    for stage in stages.stages:
        assert jaxprs.read_vars(stage.forward).issuperset(groups(stage)[3])
        # Nothing is passed on: a stage makes what it sends.
        assert not set(stage.forward.outvars[: len(stage.outputs)]) & set(stage.forward.invars)


@pytest.mark.parametrize(("name", "seed"), BOUNDARIES)
def test_only_activations_cross(name, seed):
    for stage in random_stages(name, seed).stages:
        constants, params, batch, inputs = groups(stage)
        after_params = jaxprs.dependents(stage.forward, [*params, *inputs])
        after_batch = jaxprs.dependents(stage.forward, [*constants, *batch, *inputs])
        sent = set(stage.forward.outvars[: len(stage.outputs)])
        assert sent <= after_params & after_batch


@pytest.mark.parametrize(("name", "seed"), BOUNDARIES)
def test_a_stage_has_what_it_reads(name, seed):
    stages = random_stages(name, seed)
    for index, stage in enumerate(stages.stages):
        read = jaxprs.read_vars(stage.forward)
        constants, params, batch, _ = groups(stage)
        assert read.issuperset([*constants, *batch])
        unread = {v for v in params if v not in read}
        assert index == 0 or not unread
        live = jaxprs.backward_slice(
            stage.forward, invars=stage.forward.invars, outvars=stage.forward.outvars
        )
        assert len(live.eqns) == len(stage.forward.eqns)


@pytest.mark.parametrize(("name", "seed"), BOUNDARIES)
def test_no_activation_is_computed_twice(name, seed):
    whole = jaxprs.count_primitives(case(name).graph.program.jaxpr)
    stages = random_stages(name, seed).stages
    for primitive in ("dot_general", "tanh", "exp", "rsqrt", "scan", "argmax", "random_bits"):
        assert sum(counts(s).get(primitive, 0) for s in stages) == whole.get(primitive, 0)


def test_an_unused_parameter_lives_on_the_first_stage():
    c = case("residual")
    stages = every_layer_a_stage(c.graph)
    unused = c.graph.program.params.index("unused")
    assert [s for s, stage in enumerate(stages.stages) if unused in stage.params] == [0]


def test_a_parameter_lives_on_each_stage_that_reads_it():
    c = case("tied")
    embedding = c.graph.program.params.index("embedding")
    stages = every_layer_a_stage(c.graph)
    holders = [s for s, stage in enumerate(stages.stages) if embedding in stage.params]
    readers = [s for s, layer in enumerate(c.graph.layers) if embedding in layer.params]
    assert holders == readers
    assert len(readers) == 3
    for stage in stages.stages:
        names = [c.graph.program.params[p] for p in stage.params]
        assert len(names) == len(set(names))


def test_a_skip_crosses_once_to_each_reader():
    p = {"table": array(16, 8), "blocks": blocks(), "head": array(8, 16)}

    def loss(p, ids):
        x = first = p["table"][ids]
        for i, block in enumerate(p["blocks"].values()):
            x = x + mlp(block, x)
            x = x + jnp.sin(first) if i in (1, 3) else x
        return jax.nn.logsumexp(x @ p["head"])

    graph = layers_of(loss, p, tokens())
    stages = every_layer_a_stage(graph)
    assert len(stages.stages) == 6
    readers = [s for s, stage in enumerate(stages.stages) if "sin" in counts(stage)]
    assert len(readers) == 2 and readers[0] > 1
    (skip,) = [c for c in stages.crossings if len(c.consumers) > 1]
    # The first block reads it as its input.
    assert (skip.producer, skip.consumers) == (0, (1, *readers))
    results, sent = run_forward(stages, p, tokens())
    assert_bitwise(results, run_program(graph.program, p, tokens()))
    assert len(sent) == sum(len(c.consumers) for c in stages.crossings)


def test_what_depends_on_the_batch_only_is_computed_where_it_is_read():
    c = case("tied")
    stages = every_layer_a_stage(c.graph)
    with_blocks = [s for s in stages.stages if "tanh" in counts(s)]
    assert len(with_blocks) > 1
    for stage in with_blocks:
        assert counts(stage)["cumsum"] == 1  # of the mask
        assert counts(stage)["cos"] >= 1  # of the positions
        assert stage.batch == (0,)


def test_a_rotary_table_is_in_each_attention_stage():
    stages = every_layer_a_stage(case("llama2").graph)
    has_table = ["cos" in counts(stage) for stage in stages.stages]
    assert has_table == [False, True, False, True, False, False]
    assert [len(stage.inputs) for stage in stages.stages] == [0, 1, 1, 1, 1, 1]
    # Only the ends read the tokens.
    assert [len(stage.batch) for stage in stages.stages] == [1, 0, 0, 0, 0, 1]


def test_closed_over_arrays_are_where_they_are_read():
    first, second = array(4), array(4, seed=1)

    def loss(p, x):
        x = jnp.tanh((x * first) @ p[0])
        return (jnp.tanh(x @ p[1]) * second).sum()

    stages = every_layer_a_stage(layers_of(loss, [array(4, 4), array(4, 4)], array(2, 4)))
    assert len(stages.stages) == 2
    assert_bitwise(stages.stages[0].constants, [first])
    assert_bitwise(stages.stages[1].constants, [second])


def test_results_are_made_where_their_value_is():
    def loss(p, x):
        y = jnp.tanh(x @ p[0])
        z = jnp.tanh(y @ p[1])
        aux = {
            "a_middle": y.sum(),
            "b_same": y.sum(axis=0),
            "c_loss": z.sum(),
            "d_batch": x.sum(),
            "e_param": p[0].sum(),
            "f_literal": 3,
            "g_stream": y,
        }
        return z.sum(), aux

    p, x = [array(4, 4), array(4, 4)], array(2, 4)
    graph = layers_of(loss, p, x, has_aux=True)
    stages = every_layer_a_stage(graph)
    first, last = stages.stages
    # The cut is before what reduces y: where it falls is a matter of bytes.
    assert sorted(first.results + last.results) == list(range(8))
    assert first.results == (7,)
    assert last.makes_loss and not first.makes_loss
    assert last.params == (0, 1)
    results, _ = run_forward(stages, p, x)
    assert_bitwise(results, run_program(graph.program, p, x))


def test_integers_cross():
    c = case("routed")
    stages = every_layer_a_stage(c.graph)
    (chosen,) = [x for x in stages.crossings if not x.has_gradient]
    assert jnp.issubdtype(chosen.aval.dtype, jnp.integer)
    assert 1 in stages.stages[chosen.producer].results


def test_the_text_says_what_crosses():
    stages = every_layer_a_stage(case("residual").graph)
    lines = stages.text().splitlines()
    assert lines[0] == "float32[2,32]: stage 0 -> 1"
    assert lines[1] == "float32[2,8]: stage 1 -> 2"
    assert any(line.startswith("stage 1: block0/down") for line in lines)


@pytest.mark.parametrize("name", ["residual", "rules"])
def test_the_check_notices(name):
    stages = every_layer_a_stage(case(name).graph)
    without_params = dataclasses.replace(stages.stages[1], params=())
    with pytest.raises(AssertionError, match="a parameter has no stage"):
        dataclasses.replace(stages, stages=(stages.stages[0], without_params, *stages.stages[2:]))
    with pytest.raises(AssertionError):
        dataclasses.replace(stages, stages=stages.stages[:-1])


def test_a_bias_plus_a_mask_is_made_where_it_is_read():
    """It depends on a parameter and on the batch, but is no activation."""
    p = {"in": array(8, 8), "table": array(6), "w": [array(8, 8, seed=i) for i in range(3)]}
    batch = {"x": array(2, 6, 8), "length": jnp.array([3, 6])}

    def loss(p, batch):
        positions = jnp.arange(6)
        mask = jnp.where(positions < batch["length"][:, None, None], 0, -1e9)
        bias = p["table"][jnp.abs(positions[:, None] - positions)] + mask
        x = batch["x"] @ p["in"]
        for w in p["w"]:
            x = x + jax.nn.softmax(x @ x.mT + bias) @ x @ w
        return (x**2).mean()

    graph = layers_of(loss, p, batch)
    stages = every_layer_a_stage(graph)
    assert [(c.producer, c.consumers, c.aval.shape) for c in stages.crossings] == [
        (i, (i + 1,), (2, 6, 8)) for i in range(3)
    ]
    table = graph.program.params.index("table")
    assert [s for s, stage in enumerate(stages.stages) if table in stage.params] == [1, 2, 3]
    results, _ = run_forward(stages, p, batch)
    assert_bitwise(results, run_program(graph.program, p, batch))


@pytest.mark.parametrize(
    ("end", "has_gradient"),
    [
        (lambda x: x, True),
        (lambda x: jnp.argmax(x, axis=-1, keepdims=True).astype(jnp.float32), False),
        (jax.lax.stop_gradient, False),
        (lambda x: jnp.where(x > 0, 1.0, 2.0), False),
        (lambda x: x + jnp.sign(x), True),
    ],
)
def test_a_crossing_has_a_gradient_if_one_flows_back(end, has_gradient):
    """What a later stage reads may be float and yet lead nowhere but to integers."""

    def loss(p, x):
        for w in p[:3]:
            x = x + jnp.tanh(x @ w)
        return jnp.mean((end(x) * p[3].sum(axis=0) @ p[3]) ** 2)

    p = [array(8, 8, seed=i) for i in range(4)]
    graph = layers_of(loss, p, array(2, 8))
    stages = cut_stages(graph, [0, 1, 2, len(graph.layers)])
    assert [c.has_gradient for c in stages.crossings] == [has_gradient] * 2
    _, sums = run_gradient(stages, differentiate(stages), p, array(2, 8))
    for got, want in zip(sums, jax.grad(loss)(p, array(2, 8)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # sums in another order
