import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import STAGE_PASSES, jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.hand_on import hand_on
from passes.layer_programs import layer_programs, number_together
from passes.runner import Dump, run
from passes.split_backward import split_backward
from passes.stages import Operand, Role
from tests.passes.on_host import layers_of, run_forward
from tests.passes.small_models import MODELS, array, case, transformer
from tests.small_models import HIDDEN, loss_fn, make_batch, make_params

each_model = pytest.mark.parametrize("name", MODELS)


def stages_of(graph):
    return run(cut_stages(graph, range(len(graph.layers) + 1)), STAGE_PASSES, Dump(None))


@each_model
def test_the_programs_are_those_of_stages_of_one_layer(name):
    """Each layer cut and differentiated by itself has the same text, whatever its kind."""
    graph = case(name).graph
    stages = stages_of(graph)
    layers = layer_programs(graph)
    assert [layer.name for layer in layers] == [layer.name for layer in graph.layers]
    for layer, stage, gradient in zip(layers, stages.stages, differentiate(stages), strict=True):
        split = split_backward(gradient.backward)
        expected = {
            "F": gradient.forward,
            "B": gradient.backward,
            "I": split.input_grad,
            "W": split.weight_grad,
        }
        found = {task: program for task, program in layer.kind.programs.items() if task in "FBIW"}
        assert {task: str(program.jaxpr) for task, program in found.items()} == {
            task: str(program.jaxpr)
            for task, program in expected.items()
            if program is not None and program.writes  # which may be nothing, in a frozen layer
        }
        types = jaxprs.avals(graph.program.param_vars)
        assert layer.params == {p: types[p] for p in stage.params}


@each_model
def test_what_skips_a_layer_is_handed_on_through_it(name):
    graph = case(name).graph
    before = stages_of(graph)
    after = hand_on(before)
    for layer, plain, stage in zip(layer_programs(graph), before.stages, after.stages, strict=True):
        passed = [after.crossings[c].aval for c in stage.inputs]
        read = [before.crossings[c].aval for c in plain.inputs]
        assert layer.skipping_bytes == arrays_bytes(passed) - arrays_bytes(read)


def arrays_bytes(avals):
    return jaxprs.nbytes(aval for aval in avals if aval.shape)


@each_model
def test_operands_of_a_kind_stand_for_those_of_each_of_its_layers(name):
    graph = case(name).graph
    stages = stages_of(graph)
    gradients = differentiate(stages)
    for layer, gradient in zip(layer_programs(graph), gradients, strict=True):
        expected = {}
        for task in "forward", "backward":
            theirs, ours = getattr(layer.kind.gradient, task), getattr(gradient, task)
            expected |= zip(theirs.reads, ours.reads, strict=True)
            expected |= zip(theirs.writes, ours.writes, strict=True)
        whole = gradient.stage.program()
        own = {*whole.reads, *whole.writes}
        assert layer.operands == {x: y for x, y in expected.items() if y in own}


def test_equal_blocks_are_of_one_kind():
    layers = layer_programs(transformer(5))
    assert [layer.kind.index for layer in layers] == [0, 1, 1, 1, 1, 1, 6]
    assert len({id(layer.kind) for layer in layers}) == 3
    held = [set(layer.params) for layer in layers]
    assert len(set.union(*held)) == sum(map(len, held))  # each has parameters of its own


def test_equal_layers_of_several_models_are_of_one_kind():
    models = [layer_programs(transformer(num_blocks)) for num_blocks in (2, 3)]
    short, long = number_together(models)
    (first, *_, last), (also_first, *_, also_last) = short, long
    assert first.kind is also_first.kind and last.kind is also_last.kind
    assert {x.kind.index for x in (*short, *long)} == set(range(len({x.kind.index for x in short})))
    for before, after in zip(models, (short, long), strict=True):
        for one, other in zip(before, after, strict=True):
            assert (one.name, one.operands) == (other.name, other.operands)


def ruled(factors):
    """Layers whose text differs in nothing but the names inside of a derivative rule."""

    def make(factor):
        @jax.custom_vjp
        def rule(x):
            return jnp.tanh(x)

        rule.defvjp(lambda x: (rule(x), x), lambda x, d: (factor * d * jnp.cos(x),))
        return rule

    rules = [make(factor) for factor in factors]
    params = {"first": array(4, 8), "blocks": [array(8, 8) for _ in factors], "last": array(8, 4)}

    def loss(p, x):
        x = x @ p["first"]
        for w, rule in zip(p["blocks"], rules, strict=True):
            x = x + rule(x @ w)
        return (x @ p["last"]).sum()

    return layers_of(loss, params, array(2, 4))


@pytest.mark.parametrize(("factors", "kinds"), [((2, 3), [1, 2]), ((2, 2), [1, 1])])
def test_layers_with_other_derivative_rules_are_of_other_kinds(factors, kinds):
    layers = layer_programs(ruled(factors))
    assert [layer.kind.index for layer in layers[1:-1]] == kinds


def test_layers_that_other_layers_read_are_of_other_kinds():
    """The result of the second block goes on and to the end: its gradient comes in two parts."""
    params = {"in": array(4, 8), "blocks": [array(8, 8) for _ in range(4)]}
    params |= {"out": array(8, 4), "end": array(8, 4)}

    def loss(p, x):
        x, results = x @ p["in"], []
        for w in p["blocks"]:
            x = jnp.tanh(x @ w)
            results.append(x)
        return (x @ p["out"] + results[1] @ p["end"]).sum()

    graph = layers_of(loss, params, array(2, 4))
    _, first, second, *_ = stages_of(graph).stages
    assert str(first.forward) == str(second.forward)
    assert [layer.kind.index for layer in layer_programs(graph)[1:3]] == [1, 2]


def test_a_layer_that_makes_the_loss_is_of_another_kind():
    """Two heads do the same, but a gradient flows from one alone."""
    params = {"first": array(4, 8), "heads": [array(8, 4), array(8, 4)]}

    def loss(p, x):
        x = x @ p["first"]
        losses = [jnp.sum((x @ head) ** 2) for head in p["heads"]]
        return losses[1], losses[0]

    layers = layer_programs(layers_of(loss, params, array(2, 4), has_aux=True))
    assert [layer.kind.index for layer in layers] == [0, 1, 2]
    written = [{x.role for x in layer.kind.gradient.backward.writes} for layer in layers]
    assert written == [{Role.SUM}, {Role.COTANGENT}, {Role.COTANGENT, Role.SUM}]


@each_model
def test_what_is_run_again_is_what_the_backward_reads_of_the_forward(name):
    """Values equal to those of the forward, from what a stage that recomputes all has."""
    made = case(name)
    leaves, batch = jax.tree.leaves(made.params), jax.tree.leaves(made.batch)
    _, sent = run_forward(stages_of(made.graph), made.params, made.batch)
    for layer in layer_programs(made.graph):
        forward, again = layer.kind.gradient.forward, layer.kind.again
        read = {x for x in layer.kind.gradient.backward.reads if x in forward.writes}
        assert read == set(() if again is None else again.writes)
        if again is None:
            continue
        assert {x.role for x in again.reads}.isdisjoint({Role.SAVED, Role.COTANGENT})
        index = layer.kind.index
        values = {Operand(Role.CONSTANT, k): v for k, v in enumerate(layer.kind.gradient.constants)}
        values |= {Operand(Role.PARAM, p): v for p, v in enumerate(leaves)}
        values |= {Operand(Role.BATCH, i): v for i, v in enumerate(batch)}
        values |= {
            Operand(Role.CROSSING, c): v for (c, reader), v in sent.items() if reader == index
        }
        results = [
            dict(
                zip(
                    program.writes,
                    jaxprs.evaluate(program.jaxpr, [values[x] for x in program.reads]),
                    strict=True,
                )
            )
            for program in (forward, again)
        ]
        for operand in again.writes:
            np.testing.assert_array_equal(results[1][operand], results[0][operand])


def test_a_stage_that_recomputes_all_runs_the_matmuls_of_again_and_of_the_backward():
    graph = transformer(2)
    stages = stages_of(graph)
    whole = differentiate(stages, recompute=["all"] * len(graph.layers))
    for layer, gradient in zip(layer_programs(graph), whole, strict=True):
        kind = layer.kind
        parts = [kind.gradient.backward, *([] if kind.again is None else [kind.again])]
        matmuls = sum(jaxprs.count_primitives(x.jaxpr)["dot_general"] for x in parts)
        assert matmuls == jaxprs.count_primitives(gradient.backward.jaxpr)["dot_general"]


def test_what_is_saved_if_nothing_is_recomputed():
    """Of x + tanh(x @ up) @ down: the result of tanh and its derivative."""
    params = make_params(num_blocks=1)
    first, block, _ = layer_programs(layers_of(loss_fn, params, make_batch(size=8)))
    assert first.kind.saved_all_bytes == 0
    assert block.kind.saved_all_bytes == 2 * 4 * 8 * HIDDEN
    assert jaxprs.nbytes(block.kind.gradient.forward.avals_of(Role.SAVED)) == 4 * 8 * HIDDEN
