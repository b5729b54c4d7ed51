"""Updates of optimizers and other programs, split over devices, and run on the host."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
