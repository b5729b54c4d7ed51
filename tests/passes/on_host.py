"""Programs and stages, run equation by equation on the host, and where stages may be cut."""

import random

import jax
import jax.numpy as jnp

from passes import PROGRAM_PASSES, jaxprs
from passes.differentiate import accumulator_dtype
from passes.layer_programs import layer_programs
from passes.layers import find_layers
from passes.runner import Dump, run
from passes.split_backward import split_backward
from passes.stages import Operand, Role
from passes.trace import trace
from passes.work import count_work


def types(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def program_of(loss_fn, params, batch, *, has_aux=False):
    """Trace `loss_fn` and run the passes over programs."""
    program, _ = trace(loss_fn, types(params), types(batch), has_aux=has_aux)
    return run(program, PROGRAM_PASSES, Dump(None))


def layers_of(loss_fn, params, batch, *, has_aux=False):
    return find_layers(program_of(loss_fn, params, batch, has_aux=has_aux))


def count_layers(graph):
    """Return the work of every layer."""
    return [count_work(layer.kind) for layer in layer_programs(graph)]


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


def run_gradient(stages, gradients, params, batch, *, split=()):
    """Run the forwards in order and the backwards in reverse order.

    The stages in `split` run their backward in two parts: the weight gradients at the very end.

    Returns:
      The results of the program, and the gradient of each parameter, summed over its stages.
    """
    shared = {Operand(Role.PARAM, i): x for i, x in enumerate(jax.tree.leaves(params))}
    shared |= {Operand(Role.BATCH, i): x for i, x in enumerate(jax.tree.leaves(batch))}
    for i, x in enumerate(jax.tree.leaves(params)):
        shared[Operand(Role.SUM, i)] = jnp.zeros(x.shape, accumulator_dtype(x.dtype))
    own = [
        {Operand(Role.CONSTANT, k): x for k, x in enumerate(gradient.constants)}
        for gradient in gradients
    ]

    def run_part(s, program):
        if program is None:
            return
        values = [{**shared, **own[s]}[operand] for operand in program.reads]
        written = jaxprs.evaluate(program.jaxpr, values)
        for operand, value in zip(program.writes, written, strict=True):
            local = operand.role in (Role.SAVED, Role.KEPT)
            (own[s] if local else shared)[operand] = value

    for s, gradient in enumerate(gradients):
        run_part(s, gradient.forward)
    num_results = len(stages.program.jaxpr.outvars)
    results = [shared[Operand(Role.RESULT, r)] for r in range(num_results)]
    shared[Operand(Role.D_LOSS)] = jnp.ones((), results[0].dtype)
    for s, gradient in reversed(list(enumerate(gradients))):
        backward = gradient.backward
        run_part(s, split_backward(backward).input_grad if s in split else backward)
    for s in sorted(split, reverse=True):
        run_part(s, split_backward(gradients[s].backward).weight_grad)
    return results, [shared[Operand(Role.SUM, i)] for i in range(len(stages.program.params))]


def run_alone(gradient, params, batch, *, d_loss=1.0, sums=None):
    """Run forward and backward of a stage that is the whole model; returns its sums."""
    leaves = jax.tree.leaves(params)
    sums = [jnp.zeros(p.shape) for p in leaves] if sums is None else sums
    values = {Operand(Role.PARAM, i): x for i, x in enumerate(leaves)}
    values |= {Operand(Role.BATCH, i): x for i, x in enumerate(jax.tree.leaves(batch))}
    values |= {Operand(Role.CONSTANT, k): x for k, x in enumerate(gradient.constants)}
    values |= {Operand(Role.SUM, i): x for i, x in enumerate(sums)}
    values[Operand(Role.D_LOSS)] = jnp.float32(d_loss)
    for program in gradient.forward, gradient.backward:
        outs = jaxprs.evaluate(program.jaxpr, [values[x] for x in program.reads])
        values.update(zip(program.writes, outs, strict=True))
    return [values[Operand(Role.SUM, i)] for i in range(len(leaves))]


def assert_bitwise(got, want):
    for a, b in zip(got, want, strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)  # a literal may be a number
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
