import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.saved_values import CHEAP as CHEAP_PRIMITIVES
from passes.saved_values import FORM, choose_saved
from passes.stages import Role
from tests.passes.on_host import layers_of
from tests.passes.small_models import array

# By name, so that the list in the library is not asked about itself.
CHEAP = (
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: -x,
    lambda x, y: jnp.where(x > y, x, 2),
    lambda x, y: jnp.broadcast_to(x.reshape(-1)[:1], x.shape),
    lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32),
    lambda x, y: jax.lax.optimization_barrier((x, y))[1],
)
HEAVY = (
    lambda x, y: jnp.sin(x),
    lambda x, y: x @ y.T if x.ndim == 2 else jnp.cos(y),
    lambda x, y: jax.lax.top_k(x, x.shape[-1])[0],
    lambda x, y: jnp.broadcast_to(jnp.sum(x, keepdims=True), x.shape),
)
HEAVY_PRIMITIVES = {"sin", "cos", "dot_general", "top_k", "reduce_sum"}
MAX_VALUES = 12  # 4096 subsets


def random_equations(rng):
    """Return a jaxpr of a few equations, of values of different sizes."""
    args = [jnp.ones((n, n)) for n in (2, 2, 2)] + [jnp.ones((3, 3))]

    def fun(*args):
        values = list(args)
        for _ in range(rng.randint(2, 7)):
            x = rng.choice(values)
            y = rng.choice([v for v in values if v.shape == x.shape])
            values.append(rng.choice(rng.choice((CHEAP, HEAVY)))(x, y))
        return values[len(args) :]

    jaxpr, constants, _ = jaxprs.trace(fun, *args)
    jaxpr, more = jaxprs.inline(jaxpr)
    assert not constants and not more
    return jaxpr


def is_computable(eqns, wanted, have, *, at_hand, again):
    """Whether one can get from `have` to `wanted`, with cheap equations if only `at_hand` is read.

    Args:
      again: whether a primitive may be run again on other values.
    """
    free, have = set(at_hand), {*at_hand, *have}
    for eqn in eqns:
        is_cheap = eqn.primitive.name not in HEAVY_PRIMITIVES
        if is_cheap and free.issuperset(jaxprs.reads(eqn)):
            free.update(eqn.outvars)
            have.update(eqn.outvars)
        elif is_cheap and again(eqn) and have.issuperset(jaxprs.reads(eqn)):
            have.update(eqn.outvars)
    return wanted <= have


def size(variables):
    return jaxprs.nbytes(v.aval for v in variables)


def fewest_bytes(eqns, *, at_hand, given, wanted, again):
    """Try all sets."""
    candidates = [*given, *(v for eqn in eqns for v in eqn.outvars)]
    return min(
        size(subset)
        for length in range(len(candidates) + 1)
        for subset in itertools.combinations(candidates, length)
        if is_computable(eqns, wanted, subset, at_hand=at_hand, again=again)
    )


def is_arithmetic(eqn):
    return eqn.primitive.name in ("add", "mul", "neg")


@pytest.mark.parametrize(
    ("primitives", "again"),
    [(CHEAP_PRIMITIVES, lambda eqn: True), (FORM, lambda eqn: not is_arithmetic(eqn))],
)
@pytest.mark.parametrize("seed", range(60))
def test_no_set_of_values_has_fewer_bytes(seed, primitives, again):
    rng = random.Random(seed)
    while True:
        jaxpr = random_equations(rng)
        values = [v for eqn in jaxpr.eqns for v in eqn.outvars]
        if len(values) <= MAX_VALUES - 2:
            break
    at_hand, given = jaxpr.invars[::3], jaxpr.invars[1:3]
    wanted = set(rng.sample(values, min(len(values), rng.randint(1, 3)))) | set(
        rng.sample(jaxpr.invars, rng.randint(0, 2))
    )
    saved = choose_saved(jaxpr.eqns, at_hand=at_hand, given=given, wanted=wanted, again=primitives)
    assert len(saved) == len(set(saved))
    assert not set(saved) & set(at_hand)
    assert is_computable(jaxpr.eqns, wanted, saved, at_hand=at_hand, again=again)
    least = fewest_bytes(jaxpr.eqns, at_hand=at_hand, given=given, wanted=wanted, again=again)
    assert size(saved) == least


def test_nothing_is_wanted():
    jaxpr, _, _ = jaxprs.trace(lambda x: jnp.sin(x), jnp.ones(3))
    assert choose_saved(jaxpr.eqns, at_hand=[], given=jaxpr.invars, wanted=set()) == []


def test_sizes_beyond_32_bits():
    """Wide is wanted; narrow, of half its bytes, is enough."""

    def fun(x):
        narrow = jnp.sin(x).astype(jnp.bfloat16)
        return narrow, narrow.astype(jnp.float32)

    jaxpr, _, _ = jaxprs.trace(fun, jax.ShapeDtypeStruct((2**34,), jnp.float32))
    narrow, wide = jaxpr.outvars
    saved = choose_saved(jaxpr.eqns, at_hand=[], given=jaxpr.invars, wanted={wide})
    assert saved == [narrow]


def saved_avals(loss_fn, params, batch, *, recompute="cheap"):
    """Return the types of what a single stage saves."""
    graph = layers_of(loss_fn, params, batch)
    stages = cut_stages(graph, [0, len(graph.layers)])
    (gradient,) = differentiate(stages, recompute=[recompute])
    return gradient.forward.avals_of(Role.SAVED)


def types(avals):
    return sorted((str(a.dtype), a.shape) for a in avals)


N, WIDTH, HIDDEN = 4, 8, 32


PARAMS = {"up": array(WIDTH, HIDDEN), "down": array(HIDDEN, WIDTH)}


def clip(x):
    return jnp.where(x > 0, x, 0)


@pytest.mark.parametrize("relu", [jax.nn.relu, clip])
@pytest.mark.parametrize(
    ("is_frozen", "expected"),
    [
        # The gradient of `down` reads relu(h), that of `up` h > 0: both are cheap from h.
        (False, [("float32", (N, HIDDEN))]),
        # Without the first, the mask is enough.
        (True, [("bool", (N, HIDDEN))]),
    ],
)
def test_a_relu_saves_the_cheaper(relu, is_frozen, expected):
    def loss(p, x):
        down = jax.lax.stop_gradient(p["down"]) if is_frozen else p["down"]
        return jnp.sum(relu(x @ p["up"]) @ down)

    assert types(saved_avals(loss, PARAMS, array(N, WIDTH))) == expected


@pytest.mark.parametrize(
    ("recompute", "number"),
    [
        ("cheap", 2),
        # The gradient of `down` reads the product, those of its factors each other.
        ("none", 3),
    ],
)
def test_a_product_is_saved_unless_it_may_be_computed_again(recompute, number):
    def loss(p, x):
        w = 2 * p["up"]  # never saved: parameters are at hand
        return jnp.sum(((x @ w) * jnp.sin(x @ p["up"])) @ p["down"])

    # Of `sin` its derivative is saved, too.
    saved = saved_avals(loss, PARAMS, array(N, WIDTH), recompute=recompute)
    assert types(saved) == [("float32", (N, HIDDEN))] * (number + 1)


def test_what_the_batch_gives_is_not_saved():
    def loss(p, x):
        return jnp.sum((2 * x + 1).T.T @ p["up"])

    assert saved_avals(loss, PARAMS, array(N, WIDTH)) == []


def test_dropout_saves_at_most_a_byte_a_value():
    def without(p, x):
        return jnp.sum(jnp.tanh(x @ p["up"]) @ p["down"])

    def dropped(p, batch):
        x, key = batch
        h = jnp.tanh(x @ p["up"])
        y = jnp.where(jax.random.bernoulli(key, 0.7, h.shape), h / 0.7, 0) @ p["down"]
        return jnp.sum(
            jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), 0.7, y.shape), y, 0)
        )

    x = array(N, WIDTH)
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        extra = jaxprs.nbytes(saved_avals(dropped, PARAMS, (x, key))) - jaxprs.nbytes(
            saved_avals(without, PARAMS, x)
        )
        assert extra == N * HIDDEN + N * WIDTH


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ w.T.T,
        lambda x, w: x @ (2 * w),
        lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
        lambda x, w: jnp.einsum("nd,hd->nh", x, w.T),
    ],
)
def test_a_changed_form_of_a_parameter_is_not_saved(use):
    def loss(p, x):
        return jnp.sum(jnp.tanh(use(jnp.sin(x @ p["first"]), p["up"])).astype(jnp.float32))

    params = {"first": array(WIDTH, WIDTH), **PARAMS}
    saved = saved_avals(loss, params, array(N, WIDTH))
    assert {a.shape for a in saved} <= {(N, WIDTH), (N, HIDDEN)}


def test_of_a_normalised_weight_only_the_norm_is_saved():
    def loss(p, x):
        w = p["up"] * jax.lax.rsqrt(jnp.sum(p["up"] ** 2, axis=0))
        return jnp.sum(jnp.sin(jnp.sin(x @ p["first"]) @ w))

    params = {"first": array(WIDTH, WIDTH), **PARAMS}
    shapes = [a.shape for a in saved_avals(loss, params, array(N, WIDTH))]
    assert (WIDTH, HIDDEN) not in shapes
    assert (HIDDEN,) in shapes


def test_saved_values_are_in_the_order_they_are_made():
    rng = np.random.default_rng(0)
    jaxpr, _, _ = jaxprs.trace(lambda x: [jnp.sin(x), jnp.cos(x), jnp.exp(x)], rng.normal(size=3))
    outs = [eqn.outvars[0] for eqn in jaxpr.eqns]
    assert choose_saved(jaxpr.eqns, at_hand=[], given=jaxpr.invars, wanted=set(outs)) == outs
