"""Transfers of a new order by programs of an old one. No device needed."""

from collections import Counter
from random import Random

import jax.numpy as jnp
import pytest

from jaxptis.executor.instructions import Rows, Transfer
from jaxptis.executor.programs import Aval
from jaxptis.executor.prove import in_one_order
from jaxptis.executor.regroup import regroup
from jaxptis.executor.transfer import Route

TYPES = tuple(Aval((size,), jnp.float32) for size in (1, 2, 3))


def type_of(device, name):
    """Tell the type by the first letter of the name."""
    return TYPES["abc".index(name[0])]


def random_rows(rng, num_devices):
    """Return lists of transfers alone, many of which have become one."""
    rows = Rows(num_devices)
    for i in range(60):
        source, target = rng.sample(range(num_devices), 2)
        rows.transfer(source, target, f"{rng.choice('abc')}{i}")
    return rows


def routes_of(rows):
    """Return what crosses together in each transfer, by types."""
    return [
        Route(
            tuple(device for device, _ in step.ends),
            tuple(tuple(type_of(d, name) for name in each.sends) for d, each in step.ends),
        )
        for step in in_one_order(rows)
    ]


def crossing(rows):
    return Counter(
        (device, each.peer, name)
        for device, row in enumerate(rows.rows)
        for each in row
        for name in each.sends
    )


def alone(pair):
    """Return routes by which a value of any type crosses alone."""
    return [Route(pair, ends) for t in TYPES for ends in (((t,), ()), ((), (t,)))]


@pytest.mark.parametrize("seed", range(20))
def test_all_crosses_by_routes_that_are_known(seed):
    rng = Random(seed)
    num_devices = rng.choice([2, 3, 4])
    pairs = [(a, b) for b in range(num_devices) for a in range(b)]
    known = [route for pair in pairs for route in alone(pair)]
    known += routes_of(random_rows(rng, num_devices))
    new = random_rows(rng, num_devices)
    found = regroup(new, known, type_of)
    assert crossing(found) == crossing(new)
    assert set(routes_of(found)) <= set(known)  # both ends agree, and nobody waits forever
    as_it_was = regroup(new, routes_of(new), type_of)  # but for the order within a transfer
    assert list(map(len, as_it_was.rows)) == list(map(len, new.rows))


def test_a_route_that_takes_more_goes_before_one_that_takes_less():
    rows = Rows(2)
    for source, name in (0, "a1"), (1, "a2"), (0, "b3"), (0, "a4"):
        rows.transfer(source, 1 - source, name)
    a, b, _ = TYPES
    known = [*alone((0, 1)), Route((0, 1), ((a,), (a,))), Route((0, 1), ((b, a), ()))]
    sends = [each.sends for each in regroup(rows, known, type_of).rows[0]]
    receives = [each.receives for each in regroup(rows, known, type_of).rows[0]]
    assert sends == [("a1",), ("b3", "a4")] and receives == [("a2",), ()]


def test_what_no_route_sends_is_named():
    rows = Rows(2)
    rows.rows = [
        [Transfer(peer=1, sends=("a1", "b1"), receives=())],
        [Transfer(peer=0, sends=(), receives=("a1", "b1"))],
    ]
    known = [route for route in alone((0, 1)) if TYPES[1] not in route.sends[0]]
    with pytest.raises(ValueError, match="devices 0 and 1 have no program that sends only b1"):
        regroup(rows, known, type_of)
