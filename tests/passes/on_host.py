"""Programs and stages, run equation by equation on the host, and where stages may be cut."""

import random

import jax
import jax.numpy as jnp

from passes import PROGRAM_PASSES, jaxprs
from passes.differentiate import accumulator_dtype
from passes.layers import find_layers
from passes.runner import Dump, run
from passes.trace import trace


def types(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def program_of(loss_fn, params, batch, *, has_aux=False):
    """Trace `loss_fn` and run the passes over programs."""
    program, _ = trace(loss_fn, types(params), types(batch), has_aux=has_aux)
    return run(program, PROGRAM_PASSES, Dump(None))


def layers_of(loss_fn, params, batch, *, has_aux=False):
    return find_layers(program_of(loss_fn, params, batch, has_aux=has_aux))


def random_boundaries(num_layers, seed):
    """Return the boundaries of two or more stages, if there are layers enough."""
    rng = random.Random(seed)
    inner = range(1, num_layers)
    cuts = rng.sample(inner, rng.randint(min(1, len(inner)), len(inner)))
    return [0, *sorted(cuts), num_layers]


def parts_of(program, params):
    """Return the parts of the user's parameters that a program takes."""
    leaves = jax.tree.leaves(params)
    return [
        leaves[source.leaf][tuple(slice(start, stop) for start, stop in source.box)]
        for source in program.sources
    ]


def run_program(program, params, batch):
    args = [*program.constants, *parts_of(program, params), *jax.tree.leaves(batch)]
    return jaxprs.evaluate(program.jaxpr, args)


def run_forward(stages, params, batch):
    """Run the stages in order; each sees what is its own, and what crosses to it.

    Returns:
      The results of the program, and the values of the crossings.
    """
    params, batch = jax.tree.leaves(params), jax.tree.leaves(batch)
    sent, results = {}, {}
    for s, stage in enumerate(stages.stages):
        args = [
            *stage.constants,
            *(params[i] for i in stage.params),
            *(batch[i] for i in stage.batch),
            *(sent[i, s] for i in stage.inputs),
        ]
        outs = iter(jaxprs.evaluate(stage.forward, args))
        for i in stage.outputs:
            value = next(outs)
            sent.update(((i, consumer), value) for consumer in stages.crossings[i].consumers)
        results.update(zip(stage.results, outs, strict=True))
    return [results[r] for r in sorted(results)], sent


def run_gradient(stages, gradients, params, batch):
    """Run the forwards in order and the backwards in reverse order.

    Returns:
      The results of the program, and the gradient of each parameter, summed over its stages.
    """
    params, batch = jax.tree.leaves(params), jax.tree.leaves(batch)
    values, saved, results = {}, [], {}
    for gradient in gradients:
        stage = gradient.stage
        outs = iter(jaxprs.evaluate(gradient.forward, _own(gradient, params, batch, values)))
        values.update((i, next(outs)) for i in stage.outputs)
        results.update((r, next(outs)) for r in stage.results)
        saved.append(list(outs))
    cotangents = {}
    sums = [jnp.zeros(p.shape, accumulator_dtype(p.dtype)) for p in params]
    for gradient, kept in reversed(list(zip(gradients, saved, strict=True))):
        stage = gradient.stage
        own = _own(gradient, params, batch, values)
        args = [
            *own[: len(own) - len(stage.inputs)],
            *(values[stage.inputs[i]] for i in gradient.kept_inputs),
            *(values[stage.outputs[i]] for i in gradient.kept_outputs),
            *kept,
            *(cotangents.pop(d) for d in gradient.d_outputs),
            *[jnp.ones((), results[0].dtype)] * stage.makes_loss,
            *(sums[p] for p in stage.params),
        ]
        outs = iter(jaxprs.evaluate(gradient.backward, args))
        cotangents.update((d, next(outs)) for d in gradient.d_inputs)
        for p in stage.params:  # a parameter of several stages: each adds to the sum
            sums[p] = next(outs)
    assert not cotangents, "nobody took a cotangent"
    return [results[r] for r in sorted(results)], sums


def _own(gradient, params, batch, values):
    stage = gradient.stage
    return [
        *gradient.constants,
        *(params[i] for i in stage.params),
        *(batch[i] for i in stage.batch),
        *(values[i] for i in stage.inputs),
    ]


def assert_bitwise(got, want):
    for a, b in zip(got, want, strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)  # a literal may be a number
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
