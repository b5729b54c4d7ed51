"""Any program is split over devices, and gives bitwise what the whole gives."""

import random

import jax
import jax.numpy as jnp
import pytest

from passes import jaxprs
from passes.split_update import Tied, split_by_device
from tests.passes.updates import (
    HOMES,
    OPTIMIZERS,
    Case,
    assert_equal_unsplit,
    moves,
    programs,
    split_function,
)


@pytest.mark.parametrize("seed", range(40))
def test_any_program_is_correct(seed):
    rng = random.Random(seed)
    args = [jnp.float32(rng.choice(([1, 2, 3], 0.5))) for _ in range(rng.randint(1, 6))]
    operations = (jnp.add, jnp.multiply, lambda x, y: x.sum(), lambda x, y: y * jnp.ones(3))

    def fun(*args):
        values = list(args)
        for _ in range(rng.randint(0, 25)):
            values.append(rng.choice(operations)(rng.choice(values), rng.choice(values)))
        return [rng.choice(values) for _ in range(rng.randint(0, 8))]

    def homes():
        return rng.choice((None, tuple(rng.sample(range(4), rng.randint(1, 3)))))

    jaxpr, _, _ = jaxprs.trace(fun, *args)
    split = split_by_device(
        jaxpr,
        input_homes=[homes() for _ in args],
        output_homes=[rng.choice((homes(), Tied(rng.randrange(len(args))))) for _ in jaxpr.outvars],
    )
    assert_equal_unsplit(split, jaxpr, args)


def test_outputs_that_no_equation_makes():
    split = split_function(
        lambda x, y, unused: (x, 1.0, y, y, x * 2.0),
        (jnp.ones(3), jnp.ones(2), jnp.ones(1)),
        input_homes=[(0,), None, (2,)],
        output_homes=[(1, 0), (2,), Tied(1), (3,), None],
    )
    assert [place.homes for place in split.outputs] == [(1, 0), (2,), (3,), (3,), (0,)]
    assert [(m.source, m.target) for _, m in moves(split)] == [(0, 1)]


def test_an_input_moves_as_it_is():
    split = split_function(lambda x: x, (jnp.ones(3),), input_homes=[(2,)], output_homes=[(0, 1)])
    assert not programs(split)
    assert [(m.source, m.target, m.name) for _, m in moves(split)] == [
        (2, 0, "input0"),
        (2, 1, "input0"),
    ]


def test_nothing_to_do():
    split = split_function(lambda x: (), (jnp.ones(3),), input_homes=[None], output_homes=[])
    assert not split.phases
    assert split.inputs[0].homes == ()


def test_equations_with_two_results():
    split = split_function(
        lambda x, y: (*jax.lax.top_k(x, 2), jax.lax.top_k(x, 2)[0] + y),
        (jnp.arange(5.0), jnp.ones(2)),
        input_homes=[None, (1,)],
        output_homes=[(0, 2), (2, 0), None],
    )
    assert [place.homes for place in split.outputs] == [(0, 2), (2, 0), (1,)]


def test_what_crosses_together_is_packed_by_dtype():
    args = (jnp.ones((2, 3)), jnp.float32(2), jnp.ones(5), jnp.int32(1), jnp.ones((0, 2)))
    split = split_function(
        lambda a, b, c, n, e: (a * 2.0, b + 1.0, c, n + 1, e * 2.0),
        args,
        input_homes=[(0,)] * 5,
        output_homes=[(1,)] * 5,
    )
    packed, unpacked = split.phases
    assert len(packed.moves) == 2
    assert [program.device for program in packed.programs] == [0]
    assert [program.device for program in unpacked.programs] == [1]
    assert sorted(v.aval.shape for v in packed.programs[0].jaxpr.outvars) == [(), (12,)]


def test_keys_cross_alone():
    keys = (jax.random.key(1), jax.random.key(2))
    split = split_function(
        lambda a, b: tuple(jax.random.split(k, 2) for k in (a, b)),
        keys,
        input_homes=[(0,), (0,)],
        output_homes=[(1,), (1,)],
    )
    assert len(split.phases) == 1
    assert len(moves(split)) == 2


def test_an_initialiser_draws_shared_parameters_once():
    def init(key):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (3,)), jax.random.normal(second, (2,)), jnp.zeros(())

    split = split_function(
        init, (jax.random.key(0),), input_homes=[None], output_homes=[(1, 3), (2,), (0, 1)]
    )
    assert split.inputs[-1].homes == (1, 2)
    assert [(m.source, m.target) for _, m in moves(split)] == [(1, 3)]


def test_a_value_that_was_moved_is_read_where_it_arrived():
    split = split_function(
        lambda x, y: (x + y, jnp.sin(y) * x),
        (jnp.ones(2), jnp.ones((2, 2))),
        input_homes=[(0,), (1,)],
        output_homes=[None, None],
    )
    assert [place.homes for place in split.outputs] == [(1,), (1,)]
    assert len(moves(split)) == 1


def test_state_that_nobody_reads():
    split = split_function(
        lambda x, last, count, swapped: (last * 0.0 + x, x, count + 1, count),
        (jnp.ones(2), jnp.ones(2), jnp.int32(0), jnp.int32(0)),
        input_homes=[(2, 1), None, None, None],
        output_homes=[(2,), Tied(1), Tied(2), Tied(3)],
    )
    assert [place.homes for place in split.inputs] == [(2, 1), (2,), (1,), (1,)]


def test_the_split_is_deterministic(lenient):
    first, second = (Case(OPTIMIZERS["clipped"], HOMES) for _ in range(2))
    assert first.split.text() == second.split.text()
    assert "\n\nphase 0\n  device " in first.split.text()


@pytest.mark.parametrize(
    ("input_homes", "output_homes", "message"),
    [
        ([], [None], "1 inputs but 0 homes"),
        ([(0,)], [], "1 outputs but 0 homes"),
        ([()], [None], "input 0 has homes"),
        ([(0,)], [(1, 1)], "output 0 has homes"),
        ([(0,)], [Tied(1)], "tied to input 1"),
    ],
)
def test_homes_are_checked(input_homes, output_homes, message):
    jaxpr, _, _ = jaxprs.trace(lambda x: x + 1.0, jnp.ones(2))
    with pytest.raises(ValueError, match=message):
        split_by_device(jaxpr, input_homes=input_homes, output_homes=output_homes)


def test_side_effects_are_refused():
    def fun(x):
        jax.debug.print("{}", x)
        return x

    jaxpr, _, _ = jaxprs.trace(fun, jnp.ones(2))
    with pytest.raises(NotImplementedError, match="debug"):
        split_by_device(jaxpr, input_homes=[(0,)], output_homes=[None])
