import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import accumulator_dtype, differentiate
from passes.stages import Role
from tests.passes.on_host import (
    assert_bitwise,
    layers_of,
    random_boundaries,
    run_alone,
    run_gradient,
    run_program,
    types,
)
from tests.passes.small_models import MODELS, array, blocks, case, mlp, tokens

BOUNDARIES = [(name, seed) for name in MODELS for seed in range(3)]
# What takes time, or draws random bits: it may run once.
HEAVY = """
    dot_general exp log tanh sin logistic rsqrt erf reduce_sum reduce_max gather scatter-add argmax
    random_bits threefry2x32 scan cond while sort
""".split()  # noqa: SIM905


@functools.cache
def gradients(name, seed):
    """Return stages with random boundaries, or one layer each if the seed is None."""
    graph = case(name).graph
    count = len(graph.layers)
    boundaries = range(count + 1) if seed is None else random_boundaries(count, seed)
    stages = cut_stages(graph, boundaries)
    return stages, differentiate(stages)


def value_and_grad(loss_fn, params, batch, *, has_aux=False):
    """Run `jax.value_and_grad` equation by equation.

    Returns:
      The results, the gradients, and the count of each primitive, calls inlined and dead
      equations removed.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=has_aux)
    jaxpr, constants, _ = jaxprs.trace(gradient, types(params), types(batch))
    jaxpr, more = jaxprs.inline(jaxpr)
    jaxpr = jaxprs.drop_dead_equations(jaxpr)
    args = [*more, *constants, *jax.tree.leaves(params), *jax.tree.leaves(batch)]
    outs = jaxprs.evaluate(jaxpr, args)
    num_params = len(jax.tree.leaves(params))
    return outs[:-num_params], outs[-num_params:], jaxprs.count_primitives(jaxpr)


@functools.cache
def reference(name):
    """Return the gradients of JAX, and how often it runs each primitive."""
    c = case(name)
    return value_and_grad(c.loss, c.params, c.batch, has_aux=True)[1:]


def total_counts(gradients):
    counts = collections.Counter()
    for gradient in gradients:
        counts.update(jaxprs.count_primitives(gradient.forward.jaxpr))
        counts.update(jaxprs.count_primitives(gradient.backward.jaxpr))
    return counts


def assert_close(got, want):
    """Compare with JAX, equation by equation as well: only the order of sums differs.

    A gradient is the sum of what each reader of a value gives; the stages add them up in another
    order. Two units in the last place of float32, of the largest element, for each of the few sums.
    """
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b.astype(jnp.float32), np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize(("name", "seed"), BOUNDARIES)
def test_the_gradient_is_that_of_jax(name, seed):
    c = case(name)
    results, sums = run_gradient(*gradients(name, seed), c.params, c.batch)
    assert_bitwise(results, run_program(c.graph.program, c.params, c.batch))
    assert_close(sums, reference(name)[0])


def test_the_reference_is_that_of_jax():
    name = "rules"  # has all that equations could lose
    c = case(name)
    (_, _), want = jax.jit(jax.value_and_grad(c.loss, has_aux=True))(c.params, c.batch)
    for a, b in zip(reference(name)[0], jax.tree.leaves(want), strict=True):
        # Compiled, sums have another order.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(("name", "seed"), [(n, s) for n in MODELS for s in (0, 1, 2, None)])
def test_nothing_heavy_is_computed_twice(name, seed):
    stages, parts = gradients(name, seed)
    got, want = total_counts(parts), collections.Counter(reference(name)[1])
    # What depends on no parameter is computed in each stage that reads it.
    activations = jaxprs.dependents(stages.program.jaxpr, stages.program.param_vars)
    repeated = {
        eqn.primitive.name
        for eqn in stages.program.jaxpr.eqns
        if activations.isdisjoint(eqn.outvars)
    }
    for primitive in set(HEAVY) - (repeated - {"dot_general", "tanh", "exp", "random_bits"}):
        assert got[primitive] == want[primitive], primitive


@pytest.mark.parametrize("name", MODELS)
def test_saved_holds_nothing_that_parameters_give(name):
    for gradient in gradients(name, None)[1]:
        forward = gradient.forward.jaxpr
        reads = dict(zip(forward.invars, gradient.forward.reads, strict=True))
        writes = zip(gradient.forward.writes, forward.outvars, strict=True)
        saved = [v for operand, v in writes if operand.role == Role.SAVED]
        params = [v for v, operand in reads.items() if operand.role == Role.PARAM]
        others = [v for v in forward.invars if v not in params]
        assert not set(saved) & set(forward.invars)
        from_params_only = jaxprs.dependents(forward, params) - jaxprs.dependents(forward, others)
        assert not set(saved) & from_params_only
        assert len(saved) == len(set(saved))


@pytest.mark.parametrize("name", MODELS)
def test_the_backward_reads_all_that_is_saved(name):
    for gradient in gradients(name, None)[1]:
        saved = [x for x in gradient.forward.writes if x.role == Role.SAVED]
        assert set(saved) <= set(gradient.backward.reads)


def cotangents(operands):
    return {(x.index, x.consumer) for x in operands if x.role == Role.COTANGENT}


@pytest.mark.parametrize("name", MODELS)
def test_every_cotangent_has_a_giver_and_a_taker(name):
    stages, parts = gradients(name, None)
    given = {(*d, s) for s, part in enumerate(parts) for d in cotangents(part.backward.writes)}
    assert given == {
        (index, consumer, consumer)
        for index, crossing in enumerate(stages.crossings)
        if crossing.has_gradient
        for consumer in crossing.consumers
    }
    for s, part in enumerate(parts):
        for crossing, consumer in cotangents(part.backward.reads):
            assert stages.crossings[crossing].producer == s
            assert consumer in stages.crossings[crossing].consumers


def test_parameters_are_summed_in_float32():
    c = case("half")
    stages, parts = gradients("half", None)
    for part in parts:
        assert {a.dtype for a in part.backward.avals_of(Role.SUM)} <= {np.dtype(np.float32)}
        # What crosses has the dtype of the model.
        given = part.backward.avals_of(Role.COTANGENT)
        assert {str(a.dtype) for a in given} <= {"bfloat16"}
    assert {str(x.aval.dtype) for x in stages.crossings} == {"bfloat16"}
    _, sums = run_gradient(stages, parts, c.params, c.batch)
    for got, want in zip(sums, reference("half")[0], strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.float32))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_accumulators_are_at_least_float32(dtype, expected):
    assert accumulator_dtype(jnp.dtype(dtype)) == jnp.dtype(expected)


def test_gradients_are_added_to_what_is_given():
    c = case("residual")
    graph = c.graph
    stages = cut_stages(graph, [0, len(graph.layers)])
    (gradient,) = differentiate(stages)
    given = [jnp.full(p.shape, 2.0) for p in jax.tree.leaves(c.params)]
    sums = run_alone(gradient, c.params, c.batch, sums=given)
    want = [2 + g for g in reference("residual")[0]]
    np.testing.assert_array_equal(sums[-1], given[-1])  # unused
    assert_close(sums, want)


def test_the_loss_may_be_weighted():
    """A cotangent of 1 / 8 gives an eighth: exact, as a power of two."""
    c = case("residual")
    (gradient,) = differentiate(cut_stages(c.graph, [0, len(c.graph.layers)]))
    whole, eighth = (run_alone(gradient, c.params, c.batch, d_loss=d) for d in (1, 0.125))
    assert_bitwise(eighth, [g / 8 for g in whole])


def test_a_stage_without_differentiable_inputs():
    c = case("frozen")
    names = [layer.name for layer in c.graph.layers]
    stages = cut_stages(c.graph, [0, names.index("table"), len(names)])
    (crossing,) = stages.crossings
    assert not crossing.has_gradient
    parts = differentiate(stages)
    for part in parts:
        assert not cotangents(part.backward.reads) | cotangents(part.backward.writes)
    assert not parts[0].forward.avals_of(Role.SAVED)
    assert not parts[0].backward.writes
    _, sums = run_gradient(stages, parts, c.params, c.batch)
    assert_close(sums, reference("frozen")[0])
    frozen = [i for i, path in enumerate(stages.program.params) if path[:6] in ("block0", "block1")]
    assert not any(np.any(sums[i]) for i in frozen)


def test_integers_have_no_cotangent():
    stages, parts = gradients("routed", None)
    (chosen,) = [i for i, crossing in enumerate(stages.crossings) if not crossing.has_gradient]
    for part in parts:
        moved = cotangents(part.backward.reads) | cotangents(part.backward.writes)
        assert all(crossing != chosen for crossing, _ in moved)


def check_equals_jax(loss, params, batch):
    """Cut into as many stages as possible, compare, and return the stages."""
    graph = layers_of(loss, params, batch)
    stages = cut_stages(graph, range(len(graph.layers) + 1))
    results, sums = run_gradient(stages, differentiate(stages), params, batch)
    want, gradient, _ = value_and_grad(loss, params, batch)
    # Computed by the same equations.
    assert_bitwise(results, want)
    assert_close(sums, gradient)
    return stages


def test_a_penalty_on_all_parameters():
    params = {**blocks(), "head": array(8, 3)}

    def loss(p, x):
        for i in range(2):
            x = x + mlp(p[f"block{i}"], x)
        return jnp.mean((x @ p["head"]) ** 2) + 0.1 * sum(
            jnp.sum(w * w) for w in jax.tree.leaves(p)
        )

    check_equals_jax(loss, params, array(2, 8))


def test_a_parameter_of_three_stages_and_a_value_of_three_readers():
    params = {"table": array(16, 8), "w": array(8, 32), **blocks()}

    def loss(p, ids):
        x = first = p["table"][ids]
        for i in range(4):
            x = x + jnp.tanh(x @ p["w"]) @ p["w"].T + mlp(p[f"block{i}"], x)
            x = x + first if i in (1, 3) else x
        return jax.nn.logsumexp(x @ p["table"].T)

    stages = check_equals_jax(loss, params, tokens())
    assert max(len(crossing.consumers) for crossing in stages.crossings) >= 3
    weight = stages.program.params.index("w")
    assert sum(weight in stage.params for stage in stages.stages) >= 3


def test_a_residual_of_a_custom_rule_is_saved():
    @jax.custom_vjp
    def scaled(x):
        return x * 2

    scaled.defvjp(lambda x: (x * 2, jnp.sin(x)), lambda residual, g: (g * residual,))

    def loss(p, x):
        return jnp.sum(scaled(jnp.tanh(x @ p[0])) @ p[1])

    check_equals_jax(loss, [array(8, 32), array(32, 8)], array(2, 8))


def test_remat_recomputes_in_the_backward():
    params = {**blocks(), "head": array(8, 3)}

    def loss(p, x, wrap):
        x = x @ p["block0"]["up"] @ p["block0"]["down"]
        for i in range(4):
            x = x + wrap(mlp)(p[f"block{i}"], x)
        return jnp.mean(x @ p["head"])

    saved = {}
    for wrap in (jax.checkpoint, lambda f: f):
        graph = layers_of(functools.partial(loss, wrap=wrap), params, array(2, 8))
        (gradient,) = differentiate(cut_stages(graph, [0, len(graph.layers)]))
        saved[wrap is jax.checkpoint] = jaxprs.nbytes(gradient.forward.avals_of(Role.SAVED))
    # Two rows of four bytes: the inputs of four blocks and of the head, and one of 32 elements.
    assert saved[True] == 2 * 4 * (5 * 8 + 32) < saved[False]


def test_a_loop_without_reverse_gradient_is_refused():
    def loss(p, x):
        return jnp.sum(jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x @ p))

    graph = layers_of(loss, array(8, 8), array(2, 8))
    message = r"gradient flows through while at .*test_differentiate\.py:\d+.*use jax\.lax\.scan"
    with pytest.raises(ValueError, match=message):
        differentiate(cut_stages(graph, [0, 1]))


def test_a_while_loop_without_a_gradient_is_run():
    """Its result is an integer, and the other loop's operands are frozen."""

    def loss(p, x):
        y = x @ p[0]
        count = jax.lax.while_loop(lambda n: n < jnp.max(y), lambda n: n + 1, 0)
        frozen = jax.lax.stop_gradient(y)
        scale = jax.lax.while_loop(lambda z: z.sum() < 9, lambda z: z + 1, frozen)
        return jnp.sum(jnp.tanh(y * scale) @ p[1]) * (count + 1)

    params = [array(8, 8), array(8, 3)]
    with jax.numpy_dtype_promotion("standard"):
        check_equals_jax(loss, params, array(2, 8))
