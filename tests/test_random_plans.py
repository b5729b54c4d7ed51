"""Whatever partition, placement, order, split and recomputation: the gradient is the plain one."""

import functools
import re
from collections import Counter
from random import Random

import jax
import jax.numpy as jnp
import pytest

from experiments.random_plan import random_plan
from jaxptis.compile import build
from jaxptis.executor import holdings, steps
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.instructions import Transfer
from jaxptis.placement import Placement
from tests.small_models import IN, WIDTH, assert_close, block, block_params, matrix, normal
from tests.small_pipelines import analysis_of

NUM_MICROBATCHES = 3
DEVICES = 4
PLANS, CHUNKS = 200, 2


def make_params(seed):
    """Return the parameters of six layers, the last of which shares `table` with the first."""
    return {
        "table": matrix(seed, IN, WIDTH),
        "blocks": [block_params(seed + i) for i in range(4)],
        "bias": normal(seed, WIDTH),
    }


def make_batch(seed):
    size = 2 * NUM_MICROBATCHES
    return {"x": normal(seed, size, IN), "y": normal(seed + 1, size, IN)}


def loss_fn(params, batch):
    """Residual blocks, with a value that skips to the third and one parameter at both ends."""
    x = start = batch["x"] @ params["table"]
    for i, p in enumerate(params["blocks"]):
        x = block(p, x + start * params["bias"]) if i == 2 else block(p, x)
    return jnp.mean((x @ params["table"].T - batch["y"]) ** 2)


@functools.cache
def analysis():
    return analysis_of(loss_fn, make_params(0), make_batch(0), DEVICES, NUM_MICROBATCHES)


@functools.cache
def compiler():
    """Return one compiler for all plans, so that equal stages are compiled once."""
    return Compiler(jax.devices()[:DEVICES])


@functools.cache
def wanted(seed):
    params, batch = make_params(seed), make_batch(seed)
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    return jax.tree.leaves(params), jax.tree.leaves(batch), loss, jax.tree.leaves(grads)


def check(plan):
    """Compare with the plain gradient, twice, with other weights and data."""
    pipeline = build(analysis(), plan)
    executable, _ = steps.gradient_step(pipeline, compiler())
    assert crossing_bytes(executable) == predicted_bytes(pipeline.timeline)
    homes = pipeline.homes, holdings.batch_copies(pipeline).homes
    for seed in 0, 1000:
        params, batch, want, want_grads = wanted(seed)
        buffers = []
        for each, leaves in zip(homes, (params, batch), strict=True):
            placement = Placement(each, compiler().devices)
            buffers += placement.buffers(placement.put(leaves))
        loss, *grads = executable(buffers)
        assert_close(loss, want, rtol=1e-5)
        assert_close(grads, want_grads, rtol=1e-5)


def crossing_bytes(executable):
    """Return what goes over each link, of activations and their gradients."""
    sent = Counter()
    for device, row in enumerate(executable.rows.rows):
        for each in row:
            if isinstance(each, Transfer):
                for name in filter(re.compile(r"[xd]\d").match, each.sends):
                    sent[device, each.peer] += executable.num_bytes[name]
    return sent


def predicted_bytes(timeline):
    sent = Counter()
    for each in timeline.transfers:
        sent[each.source, each.target] += each.num_bytes
    return sent


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_plans_give_the_plain_gradient(chunk):
    layers = [layer.name for layer in analysis().graph.layers]
    assert len(layers) == 6
    kinds = set()
    for seed in range(chunk, PLANS, CHUNKS):
        plan = random_plan(Random(seed), layers=layers, num_microbatches=NUM_MICROBATCHES)
        kinds.update(task.kind for row in plan.schedule for task in row)
        check(plan)
    assert kinds == set("FBIW")
