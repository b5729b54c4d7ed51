"""Each split is proven by a plain executor, in which a device sees its own arrays only."""

import collections
import random

import jax
import pytest

from passes import jaxprs
from tests.passes.updates import (
    HOMES,
    OPTIMIZERS,
    SHAPES,
    Case,
    assert_equal_unsplit,
    moves,
    programs,
)

SINGLE_HOMES = {name: homes[:1] for name, homes in HOMES.items()}


@pytest.fixture(scope="module")
def case():
    """Return a maker of cases, which makes each once."""
    made = {}

    def make(name, homes=HOMES):
        key = name, tuple(sorted(homes.items()))
        if key not in made:
            with jax.numpy_dtype_promotion("standard"):
                made[key] = Case(OPTIMIZERS[name], homes)
        return made[key]

    return make


def array_equations(eqns):
    """Count the equations with an array as result, by primitive, but those that only pack."""
    return collections.Counter(
        eqn.primitive.name
        for eqn in eqns
        if eqn.outvars[0].aval.shape
        and eqn.primitive.name not in ("reshape", "concatenate", "slice")
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_split_update_equals_the_whole(case, name):
    update = case(name)
    assert_equal_unsplit(update.split, update.jaxpr, update.args)


@pytest.mark.parametrize("seed", range(6))
def test_any_assignment_is_correct(case, seed):
    rng = random.Random(seed)
    homes = {name: tuple(rng.sample(range(4), rng.choice((1, 1, 2, 3)))) for name in SHAPES}
    update = case(rng.choice(("clipped", "adafactor", "skip_not_finite")), homes)
    assert_equal_unsplit(update.split, update.jaxpr, update.args)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_parameters_end_on_all_their_homes(case, name):
    update = case(name)
    outputs = update.split.outputs
    homes = [update.homes[name] for name in sorted(update.homes)]
    assert [place.homes for place in outputs[: len(homes)]] == homes
    state_homes = [place.homes for place in outputs[len(homes) :]]
    assert state_homes == list(update.state_homes().values())


@pytest.mark.parametrize(
    "name",
    ["momentum", "adamw", "clipped", "lamb", "lion", "ema", "skip_not_finite", "scaled_momentum"],
)
def test_state_arrays_live_with_the_owner_of_their_parameter(case, name):
    update = case(name)
    found = 0
    for path, homes in update.state_homes().items():
        for param in SHAPES:
            if SHAPES[param] and f"'{param}'" in path:
                assert homes == update.homes[param][:1], path
                found += 1
    assert found >= len(SHAPES) - 1


def test_the_count_is_on_every_device_that_reads_it(case):
    update = case("adamw")
    counts = [homes for path, homes in update.state_homes().items() if path.endswith(".count")]
    assert set(counts) == {(0, 1, 2, 3)}
    assert not any("int32" in move.name for _, move in moves(update.split))


def test_without_a_norm_only_shared_parameters_cross(case):
    assert len(case("adamw", SINGLE_HOMES).split.phases) == 1
    assert not moves(case("adamw", SINGLE_HOMES).split)
    gradients, parameters = case("adamw").split.phases
    assert [(m.source, m.target) for m in gradients.moves] == [(1, 3), (2, 3), (3, 0)]
    assert [(m.source, m.target) for m in parameters.moves] == [(0, 3), (3, 1), (3, 2)]


def test_a_global_norm_takes_three_phases(case):
    split = case("clipped", SINGLE_HOMES).split
    assert len(split.phases) == 3
    partial, total, update = split.phases
    assert sorted({(m.source, m.target) for m in partial.moves}) == [(1, 0), (2, 0), (3, 0)]
    assert [program.device for program in total.programs] == [0]
    assert {(m.source, m.target) for m in total.moves} == {(0, 1), (0, 2), (0, 3)}
    assert [program.device for program in update.programs] == [0, 1, 2, 3]
    assert not update.moves


def test_a_global_norm_keeps_no_array_between_phases(case):
    split = case("clipped", SINGLE_HOMES).split
    for program in programs(split)[:-4]:
        assert all(v.aval.size <= 2 for v in program.jaxpr.outvars)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_array_crosses_between_two_devices_at_a_time(case, name):
    split = case(name).split
    dtypes = {
        (program.device, output): v.aval.dtype
        for program in programs(split)
        for output, v in zip(program.outputs, program.jaxpr.outvars, strict=True)
    }
    inputs = {
        place.name: v.aval.dtype
        for place, v in zip(split.inputs, case(name).jaxpr.invars, strict=True)
    }
    crossing = [
        (k, m.source, m.target, dtypes.get((m.source, m.name), inputs.get(m.name)))
        for k, m in moves(split)
    ]
    assert len(crossing) == len(set(crossing))


@pytest.mark.parametrize("name", ["momentum", "adamw", "clipped", "lamb", "lion", "adafactor"])
def test_no_array_is_computed_twice(case, name):
    update = case(name)
    parts = [eqn for program in programs(update.split) for eqn in program.jaxpr.eqns]
    whole = array_equations(update.jaxpr.eqns)
    for primitive in ("sqrt", "mul", "div", "add", "add_any", "square", "sub"):
        assert array_equations(parts)[primitive] == whole[primitive]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_programs_have_no_dead_equations(case, name):
    for program in programs(case(name).split):
        live = jaxprs.backward_slice(
            program.jaxpr, invars=program.jaxpr.invars, outvars=program.jaxpr.outvars
        )
        assert len(live.eqns) == len(program.jaxpr.eqns)
        assert jaxprs.read_vars(program.jaxpr).issuperset(program.jaxpr.invars)


def test_noise_is_drawn_where_it_is_read(case):
    update = case("noise", SINGLE_HOMES)
    (key,) = [homes for path, homes in update.state_homes().items() if "key" in path]
    assert key == (0, 1, 2, 3)
    assert not moves(update.split)


def test_an_opaque_condition_runs_on_one_device(case):
    ran = [
        program.device
        for program in programs(case("multi_steps").split)
        if jaxprs.count_primitives(program.jaxpr).get("cond")
    ]
    assert len(ran) == len(set(ran))


def test_one_device_runs_one_program(case):
    update = case("clipped", dict.fromkeys(SHAPES, (5,)))
    (phase,) = update.split.phases
    (program,) = phase.programs
    assert program.device == 5
    assert len(program.jaxpr.eqns) == len(update.jaxpr.eqns)
