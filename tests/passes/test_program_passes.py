"""Every pass over programs, on every program here: equal results and the expected change."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import PROGRAM_PASSES, jaxprs
from passes.runner import Dump, run
from passes.trace import trace
from tests.passes.on_host import assert_bitwise, types

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(3, 2), "b": jnp.array([0.3, -0.7])}
BATCH = {"x": jnp.linspace(-2.0, 1.0, 12).reshape(4, 3), "n": jnp.arange(4)}
TABLE = np.linspace(0.0, 1.0, 3, dtype=np.float32)
PROGRAMS: dict[str, tuple] = {}


def program(**change):
    """Register a program, and by how much each pass changes the counts of its primitives."""

    def register(loss_fn):
        PROGRAMS[loss_fn.__name__] = loss_fn, change
        return loss_fn

    return register


@program()
def plain(p, batch):
    return jnp.sum(batch["x"] @ p["w"] + p["b"])


@program(inline_calls={"jit": -4})
def nested_jit(p, batch):
    square = jax.jit(lambda x: x * x)
    twice = jax.jit(lambda x: square(x) + square(x + 1))
    return jax.jit(lambda: jnp.sum(twice(batch["x"] @ p["w"])))()


@program(inline_calls={"jit": -2})
def same_function_twice(p, batch):
    dense = jax.jit(lambda x, w: jnp.tanh(x @ w))
    return jnp.sum(dense(dense(batch["x"], p["w"]), p["w"].T))


@program(inline_calls={"jit": -2})
def results_of_calls_are_inputs(p, batch):
    swap = jax.jit(lambda x, y: (y, x, 1.0))
    b, w, one = swap(*swap(p["w"], p["b"])[:2])
    return jnp.sum(batch["x"] @ b + w) * one


# A fori_loop counts in its body, which nobody reads here.
@program(drop_dead={"add": -1})
def jit_in_loops_and_branches(p, batch):
    step = jax.jit(lambda x: jnp.sin(x))
    x = jax.lax.scan(lambda c, _: (step(c), None), batch["x"] @ p["w"], length=3)[0]
    x = jax.lax.cond(x[0, 0] > 0, step, lambda y: y * 2, x)
    return jnp.sum(jax.lax.fori_loop(0, 2, lambda _, c: step(c), x))


@jax.custom_jvp
def halved(x):
    return jnp.sin(x)


@halved.defjvp
def _(primals, tangents):
    return jnp.sin(primals[0]), tangents[0] / 2


@jax.custom_vjp
def negated(x):
    return jnp.cos(x)


negated.defvjp(lambda x: (jnp.cos(x), None), lambda _, g: (-g,))


@program(inline_calls={"jit": -1})
def custom_rules_and_remat(p, batch):
    inner = jax.jit(lambda x: negated(halved(x)))
    return jnp.sum(jax.checkpoint(jax.jit(jnp.tanh))(inner(batch["x"] @ p["w"])))


@program(drop_dead={"exp": -1, "log": -1})
def dead_equations(p, batch):
    jnp.log(jnp.exp(p["w"]))
    return jnp.sum(batch["x"] @ p["w"])


# After inlining too, but drop_dead sees into calls by itself.
@program(inline_calls={"jit": -1}, drop_dead={"exp": -1})
def dead_result_of_a_call(p, batch):
    both = jax.jit(lambda x: (x * 2, jnp.exp(x)))
    return jnp.sum(batch["x"] @ both(p["w"])[0])


@program(drop_dead={"exp": -1, "add": -1})
def dead_in_a_loop(p, batch):
    def body(carry, _):
        x, dead = carry
        return (jnp.sin(x), dead + 1), jnp.exp(x)

    (x, _), _ = jax.lax.scan(body, (batch["x"] @ p["w"], 0), length=2)
    return jnp.sum(x)


@program(inline_calls={"jit": -1})
def closed_over_arrays(p, batch):
    table, offset = jnp.asarray(TABLE), jnp.asarray(TABLE[:2])
    shift = jax.jit(lambda x: x + table)
    return jnp.sum(shift(batch["x"]) @ p["w"] + offset)


@program(inline_calls={"jit": -1}, drop_dead={"jit": -1, "mul": -2, "broadcast_in_dim": -2})
def unread_constants(p, batch):
    table, offset = jnp.asarray(TABLE), jnp.asarray(TABLE[:2])
    scale = jax.jit(lambda x: x * table)
    scale(batch["x"])
    p["w"] * offset
    return jnp.sum((batch["x"] + table) @ p["w"])


@program()
def result_is_an_input(p, batch):
    return p["b"][0]


@functools.cache
def traced(name):
    return trace(PROGRAMS[name][0], types(PARAMS), types(BATCH), has_aux=False)[0]


@functools.cache
def results(name):
    return compiled(traced(name))


def compiled(program):
    """Run as one program: XLA inlines calls too, so that results may be compared bitwise."""
    args = [*program.constants, *jax.tree.leaves(PARAMS), *jax.tree.leaves(BATCH)]
    return jax.jit(functools.partial(jaxprs.evaluate, program.jaxpr))(args)


def counts(program):
    return collections.Counter(jaxprs.count_primitives(program.jaxpr))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("a_pass", PROGRAM_PASSES)
def test_a_pass_keeps_the_results(a_pass, name):
    after = a_pass(traced(name))
    after.check()
    assert (after.params, after.batch) == (traced(name).params, traced(name).batch)
    assert_bitwise(compiled(after), results(name))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("a_pass", PROGRAM_PASSES)
def test_a_pass_changes_what_it_should(a_pass, name):
    before, after = counts(traced(name)), counts(a_pass(traced(name)))
    change = {key: after[key] - before[key] for key in before | after if after[key] != before[key]}
    assert change == PROGRAMS[name][1].get(a_pass.__name__, {})


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("a_pass", PROGRAM_PASSES)
def test_applied_twice_is_applied_once(a_pass, name):
    once = a_pass(traced(name))
    twice = a_pass(once)
    assert counts(twice) == counts(once)
    assert len(twice.constants) == len(once.constants)


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_passes_in_their_order_settle(name):
    once = run(traced(name), PROGRAM_PASSES, Dump(None))
    twice = run(once, PROGRAM_PASSES, Dump(None))
    assert counts(twice) == counts(once)
    assert "jit" not in (eqn.primitive.name for eqn in once.jaxpr.eqns)
    live = jaxprs.backward_slice(once.jaxpr, invars=once.jaxpr.invars, outvars=once.jaxpr.outvars)
    assert len(live.eqns) == len(once.jaxpr.eqns)
    assert_bitwise(compiled(once), results(name))


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_read_constants_stay(name):
    once = run(traced(name), PROGRAM_PASSES, Dump(None))
    assert jaxprs.read_vars(once.jaxpr).issuperset(once.constant_vars)
    expected = {"closed_over_arrays": 2, "unread_constants": 1}
    assert len(once.constants) == expected.get(name, 0)


def test_custom_rules_stay_in_force():
    def gradient(program):
        def loss(w):
            args = [*program.constants, PARAMS["b"], w, *jax.tree.leaves(BATCH)]
            return jaxprs.evaluate(program.jaxpr, args)[0]

        return jax.jit(jax.grad(loss))(PARAMS["w"])

    before = traced("custom_rules_and_remat")
    after = run(before, PROGRAM_PASSES, Dump(None))
    assert_bitwise([gradient(after)], [gradient(before)])
    # By the rules written above, which are not the true ones.
    x = BATCH["x"] @ PARAMS["w"]
    by_hand = -(1 - jnp.tanh(jnp.cos(jnp.sin(x))) ** 2) / 2
    np.testing.assert_allclose(gradient(after), BATCH["x"].T @ by_hand, rtol=1e-5)  # float32


def test_variables_of_a_body_are_bound_anew_at_each_call():
    after = PROGRAM_PASSES[0](traced("same_function_twice"))
    made = [v for eqn in after.jaxpr.eqns for v in eqn.outvars]
    assert len(made) == len(set(made))


def test_names_of_scopes_survive_inlining():
    def loss(p, batch):
        def inner(x):
            with jax.named_scope("inner"):
                return jnp.sin(x)

        with jax.named_scope("outer"):
            return jnp.sum(jax.jit(inner)(batch["x"] @ p["w"]))

    program, _ = trace(loss, types(PARAMS), types(BATCH), has_aux=False)
    after = run(program, PROGRAM_PASSES, Dump(None))
    (sin,) = [eqn for eqn in after.jaxpr.eqns if eqn.primitive.name == "sin"]
    scopes = str(sin.source_info.name_stack).split("/")
    assert scopes[0] == "outer" and scopes[-1] == "inner"
