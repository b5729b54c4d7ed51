"""Each split is proven by a plain executor, in which a device sees its own arrays only."""

import collections
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from passes import jaxprs
from passes.split_update import Tied, split_by_device

SHAPES = {
    "embedding": (6, 4),
    "layers/0/kernel": (4, 4),
    "layers/0/bias": (4,),
    "layers/1/kernel": (4, 4),
    "layers/1/bias": (4,),
    "scale": (),
    "head": (6, 4),
}
HOMES = {
    "embedding": (0, 3),
    "layers/0/kernel": (1,),
    "layers/0/bias": (1,),
    "layers/1/kernel": (2,),
    "layers/1/bias": (2,),
    "scale": (3, 1, 2),
    "head": (3,),
}
SINGLE_HOMES = {name: homes[:1] for name, homes in HOMES.items()}
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100)


def skip_not_finite():
    """Keep the old momentum, leaf by leaf, if any gradient is not finite."""

    def init(params):
        return jnp.int32(0), optax.tree.zeros_like(params)

    def update(grads, state, params=None):
        skipped, trace = state
        finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]))
        new = jax.tree.map(lambda m, g: jnp.where(finite, 0.9 * m + g, m), trace, grads)
        return new, (jnp.where(finite, skipped, skipped + 1), new)

    return optax.GradientTransformation(init, update)


def scaled_momentum():
    """Let the momentum meet the norm of all gradients before it meets its own gradient."""

    def init(params):
        return optax.tree.zeros_like(params)

    def update(grads, state, params=None):
        norm = optax.tree.norm(grads)
        new = jax.tree.map(lambda m, g: m * norm + g, state, grads)
        return new, new

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "lamb": optax.lamb(1e-2),
    "lion": optax.lion(1e-2),
    "apply_if_finite": optax.apply_if_finite(optax.adamw(1e-2), 3),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-2), 2),
    "ema": optax.chain(optax.ema(0.9), optax.scale(-0.1)),
    "noise": optax.chain(optax.add_noise(0.1, 0.9, jax.random.key(0)), optax.sgd(0.1)),
    "skip_not_finite": skip_not_finite(),
    "scaled_momentum": scaled_momentum(),
}


class Case:
    """The update of parameters that are spread over devices."""

    def __init__(self, optimizer, homes):
        rng = np.random.default_rng(0)
        self.homes = homes
        self.params = {name: jnp.float32(rng.normal(size=SHAPES[name])) for name in homes}
        copies = {
            name: [jnp.float32(rng.normal(size=SHAPES[name])) for _ in homes[name]]
            for name in homes
        }
        state = jax.tree.map(
            lambda x: x + 0.5 if jaxprs.is_float(x) else x, optimizer.init(self.params)
        )
        args = (copies, self.params, state)

        def update(copies, params, state):
            grads = {name: sum(parts[1:], parts[0]) for name, parts in copies.items()}
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jaxpr, constants, _ = jaxprs.trace(update, *args)
        jaxpr, more = jaxprs.inline(jaxpr)
        self.jaxpr = jaxprs.drop_dead_equations(jaxpr)
        self.args = [*more, *constants, *jax.tree.leaves(args)]
        paths = jax.tree.leaves_with_path(state)
        self.state_paths = [jax.tree_util.keystr(path) for path, _ in paths]
        self.first_state = len(self.args) - len(paths)

        copy_homes = [(d,) for name in sorted(homes) for d in homes[name]]
        param_homes = [homes[name] for name in sorted(homes)]
        free = len(more) + len(constants)
        self.input_homes = [*[None] * free, *copy_homes, *param_homes, *[None] * len(paths)]
        ties = [Tied(self.first_state + i) for i in range(len(paths))]
        self.split = split_by_device(
            self.jaxpr, input_homes=self.input_homes, output_homes=[*param_homes, *ties]
        )

    def state_homes(self):
        """Return where each leaf of the state lives, by its path."""
        places = self.split.inputs[self.first_state :]
        return {p: place.homes for p, place in zip(self.state_paths, places, strict=True)}


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


def run_on_host(split, args):
    """Run `split` with a table of arrays for each device; return the copies of each output."""
    tables = collections.defaultdict(dict)
    for place, arg in zip(split.inputs, args, strict=True):
        for device in place.homes:
            tables[device][place.name] = arg
    for phase in split.phases:
        for program in phase.programs:
            table = tables[program.device]
            results = jaxprs.evaluate(program.jaxpr, [table[name] for name in program.inputs])
            table.update(zip(program.outputs, results, strict=True))
        for move in phase.moves:
            tables[move.target][move.name] = tables[move.source][move.name]
    return [[tables[device][place.name] for device in place.homes] for place in split.outputs]


def bits(array):
    array = jnp.asarray(array)  # a literal may be a number
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return array.dtype, array.shape, np.asarray(array).tobytes()


def assert_equal_unsplit(split, jaxpr, args):
    want = jaxprs.evaluate(jaxpr, args)
    for copies, whole in zip(run_on_host(split, args), want, strict=True):
        assert copies
        assert all(bits(copy) == bits(whole) for copy in copies)


def split_function(fun, args, *, input_homes, output_homes):
    """Split a traced function, prove the split, and return it."""
    jaxpr, constants, _ = jaxprs.trace(fun, *args)
    jaxpr, more = jaxprs.inline(jaxpr)
    free = [*more, *constants]
    split = split_by_device(
        jaxpr, input_homes=[*[None] * len(free), *input_homes], output_homes=output_homes
    )
    assert_equal_unsplit(split, jaxpr, [*free, *jax.tree.leaves(args)])
    return split


def programs(split):
    return [program for phase in split.phases for program in phase.programs]


def moves(split):
    return [(k, move) for k, phase in enumerate(split.phases) for move in phase.moves]


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


def test_one_device_runs_one_program(case):
    update = case("clipped", dict.fromkeys(SHAPES, (5,)))
    (phase,) = update.split.phases
    (program,) = phase.programs
    assert program.device == 5
    assert len(program.jaxpr.eqns) == len(update.jaxpr.eqns)


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
