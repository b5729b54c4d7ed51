"""Parameters of which slices are read become these slices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import PROGRAM_PASSES, jaxprs
from passes.runner import Dump, run
from passes.split_params import split_params
from passes.trace import trace
from tests.passes.on_host import assert_bitwise, parts_of, run_program, types

LAYERS, WIDTH = 3, 4
READS: dict[str, tuple] = {}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"b": normal(1, 5), "w": normal(2, LAYERS, WIDTH, WIDTH)}
BATCH = normal(3, 2, WIDTH)


def reads(*names):
    """Register a function, and the names of the parts of w and of b, where they are cut."""

    def register(loss):
        READS[loss.__name__] = loss, names
        return loss

    return register


def product(x, ws):
    return functools.reduce(jnp.matmul, ws, x).sum()


@reads("b", "w[0]", "w[1]", "w[2]")
def each_layer(p, x):
    return product(x, [p["w"][k] for k in range(LAYERS)])


@reads("b", "w[:,0]", "w[:,1:4]")
def along_another_axis(p, x):
    return jnp.sum(p["w"][:, :1] @ x.T) + jnp.sum(p["w"][:, 1:] * 2)


@reads("b", "w[0]", "w[1]", "w[2]")
def after_a_transpose_a_cast_and_a_sum(p, x):
    stack = (p["w"] * 2 + p["w"] ** 2).transpose(1, 0, 2).astype(jnp.bfloat16)
    return product(x, [stack[:, k].astype(jnp.float32) for k in range(LAYERS)])


@reads("b", "w[0]", "w[1]", "w[2]")
def times_a_constant(p, x):
    stack = p["w"] * np.linspace(-1, 1, p["w"].size, dtype=np.float32).reshape(p["w"].shape)
    return product(x, [stack[k] for k in range(LAYERS)])


@reads("b", "w[0]", "w[1]", "w[2]")
def frozen(p, x):
    stack = jax.lax.stop_gradient(p["w"])
    return product(x, [stack[k] for k in range(LAYERS)])


@reads("b", "w[0:2]", "w[2]")
def flipped(p, x):
    stack = p["w"][::-1, ::-1]
    return product(x, [stack[0]]) + (stack[1:, :1] * x.sum()).sum()


@reads("b", "w[0]", "w[1:3,0:2]", "w[1:3,2:4]")
def parts_of_parts(p, x):
    first, rest = p["w"][:1], p["w"][1:].reshape(2, WIDTH, 2, 2)
    return x.sum() * first.sum() * (rest[:, :2] * rest[:, 2:]).sum()


@reads("b[0:2]", "b[2]", "b[3:5]", "w")
def overlapping_slices(p, x):
    return x.sum() * (p["b"][:3] @ p["b"][2:])


@reads("b", "w[0]", "w[1]", "w[2]")
def a_part_that_nobody_reads(p, x):
    return product(x, [p["w"][0], p["w"][2]])


@reads("b[0:2]", "b[2:5]", "w")
def split_and_concatenated(p, x):
    first, rest = jnp.split(jnp.concatenate([p["b"], -p["b"]]), [2])
    return x.sum() * (first.sum() + rest[:3].sum() * 2 + rest[3:5].sum() + rest[5:].sum())


@reads("b", "w")
def one_slice_only(p, x):
    return x.sum() * p["b"][:3].sum()


@reads("b", "w")
def also_read_whole(p, x):
    return product(x, [p["w"][0], p["w"][1], p["w"].sum(axis=0)])


@reads("b", "w")
def slices_of_activations(p, x):
    y = jnp.einsum("bi,lij->lbj", x, p["w"])
    return y[0].sum() + y[1].sum()


@reads("b", "w")
def rows_that_the_batch_chooses(p, x):
    return p["w"][jnp.argmax(x[0])].sum() + p["w"][jnp.argmin(x[0])].sum()


@functools.cache
def traced(name):
    return run(
        trace(READS[name][0], types(PARAMS), types(BATCH), has_aux=False)[0],
        PROGRAM_PASSES[:-1],
        Dump(None),
    )


@pytest.mark.parametrize("name", READS)
def test_names_of_the_parts(name):
    after = split_params(traced(name))
    assert after.params == READS[name][1]
    if after.params == ("b", "w"):
        assert after is traced(name)


@pytest.mark.parametrize("name", READS)
def test_results_stay(name):
    after = split_params(traced(name))
    after.check()
    assert_bitwise(run_program(after, PARAMS, BATCH), run_program(traced(name), PARAMS, BATCH))


@pytest.mark.parametrize("name", READS)
def test_parts_make_up_the_whole(name):
    after = split_params(traced(name))
    parts = parts_of(after, PARAMS)
    assert [part.shape for part in parts] == [v.aval.shape for v in after.param_vars]
    for leaf, of_leaf, pieces in zip(
        jax.tree.leaves(PARAMS), after.leaves, after.pieces, strict=True
    ):
        assert sum(parts[p].size for p in of_leaf) == leaf.size
        assert len(set(pieces)) == len(of_leaf)


@pytest.mark.parametrize("name", READS)
def test_applied_twice_is_applied_once(name):
    once = split_params(traced(name))
    assert split_params(once) is once


def test_no_slice_is_left():
    counts = jaxprs.count_primitives(split_params(traced("each_layer")).jaxpr)
    assert "slice" not in counts and counts["squeeze"] == LAYERS


def test_a_part_can_be_cut_again():
    once = split_params(traced("each_layer"))

    def loss(params, x):
        _, first, *rest = params
        halves = x[:, :2] @ first[0, :2] + x[:, 2:] @ first[0, 2:]
        return product(halves, [part[0] for part in rest])

    parts = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in once.param_vars]
    cut_by_hand, _ = trace(loss, parts, types(BATCH), has_aux=False)
    before = dataclasses.replace(cut_by_hand, sources=once.sources)
    after = split_params(before)
    assert after.params == ("b", "w[0,0:2]", "w[0,2:4]", "w[1]", "w[2]")
    assert_bitwise(run_program(after, PARAMS, BATCH), run_program(before, PARAMS, BATCH))
