"""The update of parts gives the parts of the update, and stays in parts where it can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from passes import jaxprs
from passes.boxes import whole
from passes.place import Tied
from passes.split_values import split_values, unroll_split_scans

pytestmark = pytest.mark.usefixtures("lenient")

LAYERS = 3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"k": normal(0, LAYERS, 8, 16), "n": normal(1, 16, LAYERS), "w": normal(2, 4, 4)}
GRADS = jax.tree.map(lambda x: jnp.cos(3 * x), PARAMS)


def layers(shape, axis):
    """Return a piece for each layer, which are stacked on `axis`."""
    full = whole(shape)
    return tuple((*full[:axis], (k, k + 1), *full[axis + 1 :]) for k in range(LAYERS))


PIECES = (layers((LAYERS, 8, 16), 0), layers((16, LAYERS), 1), (whole((4, 4)),))


def by_median():
    """Divide by the median of each leaf, which cannot be combined from parts."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: g / jnp.median(jnp.abs(g)), updates), state

    return optax.GradientTransformation(lambda params: (), update)


# Each optimizer, and whether everything can be computed in parts.
OPTIMIZERS = {
    "adamw": (optax.adamw(1e-2), True),
    "clipped": (optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)), True),
    "momentum": (optax.sgd(1e-2, momentum=0.9, nesterov=True), True),
    "lamb": (optax.lamb(1e-2), True),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=8), True),
    "lion": (optax.lion(1e-2), True),
    "median": (optax.chain(by_median(), optax.adam(1e-2)), False),
    "every second": (optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), False),
}


@functools.cache
def split(name):
    """Return the split update, what it was made of, and the first state."""
    optimizer, _ = OPTIMIZERS[name]
    structure = jax.tree.structure(PARAMS)

    def update(grads, params, state):
        grads, params = (jax.tree.unflatten(structure, x) for x in (grads, params))
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.leaves(optax.apply_updates(params, updates)), state

    state = optimizer.init(PARAMS)
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(PARAMS)]
    jaxpr, constants, _ = jaxprs.trace(update, leaves, leaves, state)
    jaxpr, inlined = jaxprs.inline(jaxpr)
    assert not constants and not inlined
    num_state = len(jax.tree.leaves(state))
    result = split_values(
        jaxpr,
        inputs=[*PIECES, *PIECES, *[None] * num_state],
        outputs=[*PIECES, *(Tied(2 * len(PIECES) + i) for i in range(num_state))],
    )
    return result, jaxpr, state


def cut(leaves, pieces):
    return [
        leaf[tuple(slice(start, stop) for start, stop in box)]
        for leaf, boxes in zip(leaves, pieces, strict=True)
        for box in boxes
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_parts_of_an_update(name):
    result, jaxpr, state = split(name)
    jaxprs.check(result.jaxpr)
    leaves = [*jax.tree.leaves(GRADS), *jax.tree.leaves(PARAMS), *jax.tree.leaves(state)]
    out_pieces = [*PIECES, *result.inputs[2 * len(PIECES) :]]
    for _ in range(2):  # from the first state, and from the next
        want = jax.jit(functools.partial(jaxprs.evaluate, jaxpr))(leaves)
        args = cut(leaves, result.inputs)
        got = jax.jit(functools.partial(jaxprs.evaluate, result.jaxpr))(args)
        for a, b in zip(got, cut(want, out_pieces), strict=True):
            # Sums of the same numbers, in another order.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        leaves = [*leaves[: len(PIECES)], *want]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_put_together(name):
    counts = jaxprs.count_primitives(split(name)[0].jaxpr)
    assert ("concatenate" not in counts) == OPTIMIZERS[name][1]


def test_the_state_is_held_in_the_parts_of_its_parameters():
    result, _, state = split("clipped")
    (adam,) = (s for s in state[1] if isinstance(s, optax.ScaleByAdamState))
    assert result.inputs[: len(PIECES)] == result.inputs[len(PIECES) : 2 * len(PIECES)] == PIECES
    assert jax.tree.leaves(state)[0] is adam.count
    assert result.inputs[2 * len(PIECES) :] == (((),), *PIECES, *PIECES)


def test_factored_state_is_held_in_parts_of_its_own():
    result, _, state = split("adafactor")
    pieces = dict(zip(map(id, jax.tree.leaves(state)), result.inputs[6:], strict=True))
    assert pieces[id(state[0].v_row["k"])] == layers((LAYERS, 8), 0)
    assert pieces[id(state[0].v_col["k"])] == layers((LAYERS, 16), 0)


def scanned(key):
    _, ws = jax.lax.scan(
        lambda c, k: (c, jax.random.normal(k, (4, 2))), 0, jax.random.split(key, LAYERS)
    )
    return ws.transpose(1, 0, 2)


def mapped(key):
    keys = jax.random.split(key, LAYERS)
    return jax.vmap(lambda k: jax.random.truncated_normal(k, -2.0, 2.0, (4, 2)), out_axes=1)(keys)


@pytest.mark.parametrize("draw", [scanned, mapped])
def test_parts_are_drawn_by_themselves(draw):
    key = jax.random.key(3)
    jaxpr, _ = jaxprs.inline(jaxprs.trace(draw, key)[0])
    pieces = layers((4, LAYERS, 2), 1)
    unrolled, constants = unroll_split_scans(jaxprs.drop_dead_equations(jaxpr), [pieces])
    assert not constants
    result = split_values(unrolled, inputs=[(whole(()),)], outputs=[pieces]).jaxpr
    for got, want in zip(jaxprs.evaluate(result, [key]), cut([draw(key)], [pieces]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)  # made from the same bits
    largest = max(v.aval.size for eqn in result.eqns for v in eqn.outvars)
    assert largest == 4 * 2, "the whole is nowhere"
