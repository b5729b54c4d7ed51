import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from passes import jaxprs
from passes.trace import paths, trace


def aval(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {"layers": [{"kernel": aval(3, 2)}, {"kernel": aval(2, 2)}]}
BATCH = {"x": aval(4, 3), "ids": aval(4, dtype=jnp.int32)}


def forward(p, batch):
    return batch["x"] @ p["layers"][0]["kernel"] @ p["layers"][1]["kernel"]


def mesh():
    return jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def test_inputs_are_constants_parameters_batch():
    table = jnp.arange(3.0)
    program, aux = trace(
        lambda p, b: forward(p, b).sum() + table.sum(), PARAMS, BATCH, has_aux=False
    )
    assert aux is None
    assert [v.aval.shape for v in program.constant_vars] == [(3,)]
    np.testing.assert_array_equal(program.constants[0], np.arange(3.0))
    assert program.params == ("layers/0/kernel", "layers/1/kernel")
    assert [v.aval.shape for v in program.param_vars] == [(3, 2), (2, 2)]
    assert program.batch == ("ids", "x")
    assert [v.aval.shape for v in program.batch_vars] == [(4,), (4, 3)]
    lines = program.text().splitlines()
    assert lines[:3] == [
        "constant float32[3]",
        "parameter layers/0/kernel float32[3,2]",
        "parameter layers/1/kernel float32[2,2]",
    ]


def test_aux_keeps_its_structure():
    def loss(p, batch):
        y = forward(p, batch)
        return y.sum(), {"y": y, "more": [batch["ids"]]}

    program, aux = trace(loss, PARAMS, BATCH, has_aux=True)
    assert aux == {"y": aval(4, 2), "more": [aval(4, dtype=jnp.int32)]}
    # The loss, then the leaves in the order of the tree.
    assert [v.aval.shape for v in program.jaxpr.outvars] == [(), (4,), (4, 2)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    first: object
    second: object


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"b": 1, "a": {"c": 2}}, ("a/c", "b")),
        ([{"kernel": 1}, (2, 3)], ("0/kernel", "1/0", "1/1")),
        (Pair(1, {"x": 2}), ("first", "second/x")),
        ({"none": None, "x": 1}, ("x",)),
        (1, ("",)),
        ((), ()),
    ],
)
def test_paths(tree, expected):
    assert paths(tree) == expected


def refuse(loss_fn, *messages, params=PARAMS, has_aux=False):
    with pytest.raises(ValueError) as caught:
        trace(loss_fn, params, BATCH, has_aux=has_aux)
    for message in messages:
        assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jax.random.key(0).dtype])
def test_parameters_without_gradient_are_refused(dtype):
    params = {"w": aval(3, 2), "steps": {"count": aval(dtype=dtype)}}
    refuse(
        lambda p, b: (b["x"] @ p["w"]).sum(),
        "parameter steps/count has dtype "
        + re.escape(str(dtype.dtype if hasattr(dtype, "dtype") else dtype)),
        "pass it in the batch",
        params=params,
    )


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (forward, r"has shape \(4, 2\); return its mean"),
        (lambda p, b: forward(p, b).sum()[None], r"has shape \(1,\)"),
        (lambda p, b: (forward(p, b).sum(), forward(p, b)), "return a scalar, or .* has_aux=True"),
        (lambda p, b: [forward(p, b).sum()], "must be one scalar"),
        (lambda p, b: None, "must be one scalar"),
        (lambda p, b: (forward(p, b) > 0).sum(), "must be a float, but it has dtype int32"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(loss_fn, message):
    refuse(loss_fn, message)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, b: forward(p, b).sum(),
        lambda p, b: (forward(p, b).sum(), 1, 2),
        lambda p, b: [forward(p, b).sum(), 1],
    ],
)
def test_aux_needs_a_pair(loss_fn):
    refuse(loss_fn, r"has_aux=True needs a function that returns \(loss, aux\)", has_aux=True)


def printing(p, batch):
    y = forward(p, batch)
    jax.debug.print("{}", y)
    return y.sum()


def printing_in_a_loop(p, batch):
    def body(carry, x):
        jax.debug.print("{}", x)
        return carry, None

    jax.lax.scan(body, 0, batch["x"])
    return forward(p, batch).sum()


def printing_in_a_jit(p, batch):
    return jax.jit(printing)(p, batch)


def calling_back(p, batch):
    y = forward(p, batch)
    return jax.experimental.io_callback(lambda x: x, y, y).sum()


def mutating(p, batch):
    ref = jax.new_ref(forward(p, batch))
    ref[...] += 1
    return ref[...].sum()


@pytest.mark.parametrize(
    ("loss_fn", "primitive"),
    [
        (printing, "debug_"),
        (printing_in_a_loop, "debug_"),
        (printing_in_a_jit, "debug_"),
        (calling_back, "io_callback"),
        (mutating, "ref"),
    ],
)
def test_side_effects_are_refused_with_their_line(loss_fn, primitive):
    line = r"test_trace\.py:\d+"
    refuse(loss_fn, f"side effect, .*{primitive}.* at .*{line}", "remove it, or return the value")


def test_an_equation_without_a_line_is_named(monkeypatch):
    (eqn,) = jax.make_jaxpr(lambda x: jax.lax.sin(x))(1.0).eqns
    assert re.fullmatch(r"sin at .*test_trace\.py:\d+.*", jaxprs.located(eqn))
    monkeypatch.setattr("jax._src.source_info_util.summarize", lambda source_info: "")
    assert jaxprs.located(eqn) == "sin"


def sharded(p, batch):
    doubled = jax.shard_map(
        lambda x: 2 * x, mesh=mesh(), in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )
    return doubled(forward(p, batch)).sum()


def constrained(p, batch):
    sharding = NamedSharding(mesh(), PartitionSpec("d"))
    return jax.lax.with_sharding_constraint(forward(p, batch), sharding).sum()


def put(p, batch):
    return jax.device_put(forward(p, batch), jax.devices()[1]).sum()


def put_in_a_branch(p, batch):
    y = forward(p, batch)
    return jax.lax.cond(y[0, 0] > 0, lambda: jax.device_put(y, jax.devices()[1]), lambda: y).sum()


@pytest.mark.parametrize(
    ("loss_fn", "primitive"),
    [
        (sharded, "shard_map"),
        (constrained, "sharding_constraint"),
        (put, "device_put"),
        (put_in_a_branch, "device_put"),
    ],
)
def test_values_bound_to_devices_are_refused_with_their_line(loss_fn, primitive):
    refuse(
        loss_fn, rf"{primitive} at .*test_trace\.py:\d+", "remove it, jaxptis places every value"
    )


def test_device_put_to_nowhere_is_allowed():
    trace(lambda p, b: jax.device_put(forward(p, b)).sum(), PARAMS, BATCH, has_aux=False)
