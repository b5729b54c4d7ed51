"""What ops cost: of programs whose work has a closed form, and of texts as GPUs have them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from experiments.hlo_ops import read_ops


def ops_of(fun, *shapes):
    avals = [
        jax.ShapeDtypeStruct(each, jnp.float32) if isinstance(each, tuple) else each
        for each in shapes
    ]
    return read_ops(jax.jit(fun).lower(*avals).compile().as_text())


def test_a_matrix_product():
    """Two flops for each product; all of both matrices is read, and the result written."""
    found = ops_of(jnp.matmul, (48, 32), (32, 80))
    (op,) = [op for op in found.ops if op.flops]
    assert op.flops == 2 * 48 * 32 * 80
    assert op.bytes_accessed == 4 * (48 * 32 + 32 * 80 + 48 * 80)
    assert op.times == 1 and "dot_general" in op.origin
    assert (found.num_open_loops, found.collectives) == (0, {})


def test_a_product_in_batches():
    found = ops_of(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (3, 8, 16), (3, 24, 16))
    assert sum(op.flops for op in found.ops) == 2 * 3 * 8 * 16 * 24


def test_a_convolution():
    """Each of 6 x 4 results of 5 channels sums 3 x 3 x 2 products, in a batch of 2."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID")

    found = ops_of(convolve, (2, 2, 8, 6), (5, 2, 3, 3))
    assert sum(op.flops for op in found.ops) == 2 * (2 * 5 * 6 * 4) * (3 * 3 * 2)


def repeat(x, w, length):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=length)[0]


def test_a_loop_counts_as_often_as_it_runs():
    found = ops_of(functools.partial(repeat, length=7), (16, 16), (16, 16))
    (op,) = [op for op in found.ops if op.flops]
    assert (op.times, op.flops) == (7, 7 * 2 * 16**3)
    assert op.bytes_accessed == 7 * 3 * 4 * 16 * 16
    assert found.num_open_loops == 0


def test_a_loop_in_a_loop():
    def loop(x, w):
        def outer(c, _):
            return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, None, length=5)[
                0
            ] + 1, None

        return jax.lax.scan(outer, x, None, length=3)[0]

    found = ops_of(loop, (16, 16), (16, 16))
    assert sum(op.flops for op in found.ops) == 3 * 5 * 2 * 16**3


def test_a_loop_that_ends_when_it_likes_counts_repeat():
    def loop(x, w):
        return jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ w + 1, x)

    found = ops_of(loop, (16, 16), (16, 16))
    assert sum(op.flops for op in found.ops) == 2 * 16**3
    assert found.num_open_loops == 1


def test_of_a_table_the_rows_that_are_read():
    rows = jax.ShapeDtypeStruct((3,), jnp.int32)
    found = ops_of(lambda table, i: table[i] * 2, (10_000, 64), rows)
    read = 3 * 64 * 4
    assert 2 * read <= sum(op.bytes_accessed for op in found.ops) < 10 * read


def test_collectives_are_found():
    mesh = Mesh(jax.devices()[:2], ("pair",))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def talk(x):
        def swap(c, _):
            return jax.lax.ppermute(jnp.tanh(c), "pair", [(0, 1), (1, 0)]), None

        return jax.lax.psum(jax.lax.scan(swap, x, None, length=3)[0], "pair")

    found = ops_of(talk, (8, 8))
    assert found.collectives == {"all-reduce": 1, "collective-permute": 3}


GPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inside (p0: bf16[8,4,16], p1: bf16[4,16], p2: s32[]) -> bf16[8,4,16] {
  %p0 = bf16[8,4,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,16]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[1,4,16]{2,1,0} bitcast(%p1)
  ROOT %update = bf16[8,4,16]{2,1,0} dynamic-update-slice(%p0, %row, %p2, %zero, %zero)
}

%yes (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%p)
}

%no (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %negate.1 = f32[8]{0} negate(%p.1)
}

ENTRY %main (x: bf16[4,32], w: bf16[32,16], all: bf16[8,4,16], i: s32[], v: f32[8]) -> f32[8] {
  %x = bf16[4,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %all = bf16[8,4,16]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %v = f32[8]{0} parameter(4)
  %gemm = (bf16[4,16]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(step)/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %product = bf16[4,16]{1,0} get-tuple-element(%gemm), index=0
  %stored = bf16[8,4,16]{2,1,0} fusion(%all, %product, %i), kind=kLoop, calls=%inside
  %which = s32[] copy(%i)
  %chosen = f32[8]{0} conditional(%which, %v, %v), branch_computations={%yes, %no}
  %sum-start = f32[8]{0} all-reduce-start(%chosen), channel_id=1, to_apply=%add
  ROOT %sum-done = f32[8]{0} all-reduce-done(%sum-start)
}
"""


def test_the_text_of_a_gpu():
    found = {op.name: op for op in read_ops(GPU).ops}
    assert list(found) == ["gemm", "stored", "which", "sum-start", "copy.1", "negate.1"]
    assert found["gemm"].flops == 2 * 4 * 32 * 16
    assert found["gemm"].bytes_accessed == 2 * (4 * 32 + 32 * 16 + 4 * 16) + 64
    assert found["gemm"].origin == "jit(step)/dot_general"
    # The rows that are updated are read, where they come from and where they go, and written.
    assert found["stored"].bytes_accessed == 3 * 2 * 4 * 16 + 4
    assert found["copy.1"].bytes_accessed == 2 * 8 * 4
    assert read_ops(GPU).collectives == {"all-reduce": 1}


@pytest.mark.parametrize(("dtype", "bits"), [("f8e4m3fn", 8), ("s4", 4), ("pred", 8), ("c64", 64)])
def test_bytes_of_types(dtype, bits):
    text = f"""ENTRY %main (x: {dtype}[16]) -> {dtype}[16] {{
  %x = {dtype}[16]{{0}} parameter(0)
  ROOT %copy = {dtype}[16]{{0}} copy(%x)
}}
"""
    (op,) = read_ops(text).ops
    assert op.bytes_accessed == 2 * 16 * bits / 8
