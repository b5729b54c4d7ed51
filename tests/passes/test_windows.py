"""The body of a loop takes windows of what it slices and updates, and all else whole."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import dynamic_slice_in_dim as take
from jax.lax import dynamic_update_slice_in_dim as put

from passes import jaxprs
from passes.windows import body_on_windows

ROWS, WIDTH = 64, 5
TABLE, START = jnp.zeros((ROWS, WIDTH)), jnp.zeros((ROWS, WIDTH))


def shapes_in(step, table=TABLE, start=START):
    """Return the shapes of the table and of what is carried, as the body of a scan takes them."""

    def loop(table, start, rows):
        return jax.lax.scan(lambda carry, row: (step(table, carry, row), None), start, rows)[0]

    (eqn,) = jax.make_jaxpr(loop)(table, start, jnp.arange(ROWS)).jaxpr.eqns
    body = body_on_windows(jaxprs.scan_of(eqn))
    jaxprs.check(body)
    *taken, row = map(jaxprs.shape_of, body.invars)
    assert row == ()
    assert taken[1:] == [jaxprs.shape_of(v) for v in body.outvars]
    return taken


def copy_rows(num_rows, table, carry, row):
    return put(carry, take(table, row, num_rows), row, 0)


def in_while(table, carry, row):
    return jax.lax.fori_loop(row, row + 3, lambda i, carry: copy_rows(1, table, carry, i), carry)


def in_scan(table, carry, row):
    def step(carry, i):
        return copy_rows(1, table, carry, row + i), None

    return jax.lax.scan(step, carry, jnp.arange(3))[0]


def in_branches(table, carry, row):
    few, many = (lambda *args, n=n: copy_rows(n, *args) for n in (1, 4))
    return jax.lax.cond(row > 2, few, many, table, carry, row)


@pytest.mark.parametrize(
    ("step", "num_rows"),
    [
        (lambda *args: copy_rows(2, *args), 2),
        (lambda table, carry, row: copy_rows(3, table, copy_rows(1, table, carry, row), 0), 3),
        (jax.jit(lambda *args: copy_rows(2, *args)), 2),
        (in_while, 1),
        (in_scan, 1),
        (in_branches, 4),
    ],
)
def test_windows(step, num_rows):
    assert shapes_in(step) == [(num_rows, WIDTH)] * 2


@pytest.mark.parametrize(
    "step",
    [
        lambda table, carry, row: carry + table,
        lambda table, carry, row: put(carry * 2, take(table, row, 1) + table.sum(), row, 0),
        lambda table, carry, row: put(table, take(carry, row, 1) + carry.sum(), row, 0),
        lambda table, carry, row: put(carry, jnp.roll(table, row), 0, 0),
        lambda table, carry, row: jax.lax.while_loop(
            lambda carry: carry.sum() + table.sum() < 3, lambda carry: carry, carry
        ),
    ],
)
def test_what_is_used_as_a_whole_stays(step):
    assert shapes_in(step) == [(ROWS, WIDTH)] * 2


def test_two_that_change_places_stay():
    def loop(a, b, rows):
        return jax.lax.scan(
            lambda c, row: ((c[1], put(c[0], c[1][:1], row, 0)), None), (a, b), rows
        )

    (eqn,) = jax.make_jaxpr(loop)(TABLE, START, jnp.arange(ROWS)).jaxpr.eqns
    scan = jaxprs.scan_of(eqn)
    assert body_on_windows(scan).eqns == scan.jaxpr.eqns
