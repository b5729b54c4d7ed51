"""What a pipeline returns is what the plain function returns, in every form it takes."""

import dataclasses
import functools
import re
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxptis
from experiments.random_plan import random_plan
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import schedule
from tests.small_models import (
    IN,
    OUT,
    WIDTH,
    assert_close,
    block,
    loss_fn,
    make_batch,
    make_params,
    matrix,
    normal,
)

# The microbatches' sums are added in another order than the batch's.
RTOL = 1e-6


def make_pipelined(loss=loss_fn, *, num_devices=2, num_microbatches=2, **options):
    return jaxptis.pipeline(
        loss,
        num_microbatches=num_microbatches,
        devices=jax.devices()[:num_devices],
        **{"strategy": "1f1b", **options},
    )


def check(pipelined, loss, params, batch):
    """Compare loss and gradients with the plain ones; returns the gradients."""
    value, grads = pipelined.value_and_grad(params, batch)
    wanted_value, wanted_grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert_close(value, wanted_value, rtol=RTOL)
    assert_close(grads, wanted_grads, rtol=RTOL)
    return grads


def microbatches(batch, count):
    """Return the microbatches of a batch whose leaves all have axis 0."""
    return [
        jax.tree.map(lambda x, m=m: x[m * len(x) // count : (m + 1) * len(x) // count], batch)
        for m in range(count)
    ]


# ---- Dataflow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe"])
def test_gradients(strategy):
    pipelined = make_pipelined(num_devices=4, num_microbatches=4, strategy=strategy)
    grads = check(pipelined, loss_fn, make_params(), make_batch())
    for stage in pipelined.plan.stages:
        for layer in stage.layers:
            name, *index = layer.split("/")
            part = grads[name][int(index[0])] if index else grads[name]
            for leaf in jax.tree.leaves(part):
                assert leaf.devices() == {jax.devices()[stage.device]}
    assert pipelined.evaluate(make_params(), make_batch()).devices() == {jax.devices()[3]}


def test_one_device():
    check(make_pipelined(num_devices=1), loss_fn, make_params(1), make_batch())


def test_one_microbatch():
    check(make_pipelined(num_microbatches=1), loss_fn, make_params(1), make_batch())


def test_skip_connection_to_the_last_layer(tmp_path):
    def loss(params, batch):
        x = first = batch["x"] @ params["first"]
        for p in params["blocks"]:
            x = block(p, x)
        return jnp.mean(((x + first) @ params["head"] - batch["y"]) ** 2)

    pipelined = make_pipelined(loss, num_devices=4, dump_to=str(tmp_path))
    check(pipelined, loss, make_params(4), make_batch())
    assert re.search(r"stage 0 -> ([12], )*3\n", stages_text(tmp_path))


def test_value_read_by_two_later_stages(tmp_path):
    """The first layer makes a gate for the hidden values of the last two blocks."""

    def loss(params, batch):
        x = batch["x"] @ params["first"]
        gate = jnp.tanh(x[:, :1])
        for i, p in enumerate(params["blocks"]):
            hidden = jnp.tanh(x @ p["up"])
            x = x + (hidden * gate if i >= 2 else hidden) @ p["down"]
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    layers = (("first", "blocks/0"), ("blocks/1",), ("blocks/2",), ("blocks/3", "head"))
    plan = plan_of(layers, devices=(0, 1, 2, 3), num_microbatches=2)
    pipelined = make_pipelined(loss, num_devices=4, strategy=plan, dump_to=str(tmp_path))
    check(pipelined, loss, make_params(4), make_batch())
    assert "stage 0 -> 2, 3\n" in stages_text(tmp_path)


def stages_text(folder):
    (path,) = folder.glob("*.stages.txt")
    return path.read_text()


def test_auxiliary_loss_of_a_middle_layer():
    def loss(params, batch):
        x, extra = batch["x"] @ params["first"], jnp.float32(0)
        for i, p in enumerate(params["blocks"]):
            x = block(p, x)
            if i == 1:
                extra = jnp.mean(jnp.abs(x))
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2) + 0.1 * extra

    check(make_pipelined(loss, num_devices=4), loss, make_params(4), make_batch())


def test_integers_cross_without_a_gradient():
    """The last stage reads where the first layer's values are largest."""

    def loss(params, batch):
        x = batch["x"] @ params["first"]
        largest = jnp.argmax(x, axis=-1)
        for p in params["blocks"]:
            x = block(p, x)
        chosen = jnp.take_along_axis(x, largest[:, None], axis=-1)
        return jnp.mean((x @ params["head"] - batch["y"] + chosen) ** 2)

    check(make_pipelined(loss, num_devices=4), loss, make_params(4), make_batch())


def test_closed_over_arrays():
    offset, mask = normal(9, WIDTH), np.arange(WIDTH) % 2 == 0

    def loss(params, batch):
        x = batch["x"] @ params["first"]
        for p in params["blocks"]:
            x = block(p, jnp.where(mask, x, offset))
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    check(make_pipelined(loss), loss, make_params(2), make_batch())


# ---- Evaluation and auxiliary outputs -----------------------------------------------------------


def test_evaluation_alone():
    pipelined = make_pipelined(num_devices=4)
    value = pipelined.evaluate(make_params(), make_batch())
    assert_close(value, loss_fn(make_params(), make_batch()), rtol=RTOL)
    # Four forward programs, two transfers' programs, and what joins the results.
    forward_only = pipelined.num_compilations
    pipelined.value_and_grad(make_params(), make_batch())
    assert pipelined.num_compilations >= forward_only + 8


def loss_with_aux(params, batch):
    x = batch["x"] @ params["first"]
    for i, p in enumerate(params["blocks"]):
        x = block(p, x)
        if i == 0:
            middle = x
    out = x @ params["head"]
    errors = jnp.sum((out - batch["y"]) ** 2, axis=-1)
    aux = {
        "error": jnp.mean(jnp.sqrt(errors)),
        "error_of_sample": errors,
        "label_of_sample": jnp.argmax(out, axis=-1),
        "samples_last": out.T,
        "middle": (middle, jnp.mean(middle, axis=0)),
        "inputs": batch["x"],
    }
    return jnp.mean(errors), aux


def test_auxiliary_outputs():
    pipelined = make_pipelined(loss_with_aux, num_devices=4, num_microbatches=4, has_aux=True)
    params, batch = make_params(4), make_batch()
    (value, aux), grads = pipelined.value_and_grad(params, batch)
    wanted = jax.jit(jax.value_and_grad(loss_with_aux, has_aux=True))(params, batch)
    assert_close(((value, aux), grads), wanted, rtol=RTOL)
    np.testing.assert_array_equal(aux["label_of_sample"], wanted[0][1]["label_of_sample"])
    assert_close(pipelined.evaluate(params, batch), wanted[0], rtol=RTOL)


def test_auxiliary_outputs_of_one_microbatch():
    def loss(params, batch):
        return loss_fn(params, batch), {"size": jnp.int32(len(batch["x"]))}

    pipelined = make_pipelined(loss, num_devices=1, num_microbatches=1, has_aux=True)
    got = pipelined.evaluate(make_params(1), make_batch())
    assert_close(got, loss(make_params(1), make_batch()), rtol=RTOL)


def test_empty_auxiliary_output():
    def loss(params, batch):
        return loss_fn(params, batch), None

    pipelined = make_pipelined(loss, num_devices=1, has_aux=True)
    value, aux = pipelined.evaluate(make_params(1), make_batch())
    assert aux is None
    assert_close(value, loss_fn(make_params(1), make_batch()), rtol=RTOL)


# ---- Calls --------------------------------------------------------------------------------------


def test_new_weights_data_and_shapes():
    pipelined = make_pipelined()
    check(pipelined, loss_fn, make_params(2), make_batch())
    plan, compiled = pipelined.plan, pipelined.num_compilations
    doubled = jax.tree.map(lambda x: 2 * x, make_params(2))
    check(pipelined, loss_fn, doubled, make_batch(seed=300))
    assert pipelined.num_compilations == compiled
    check(pipelined, loss_fn, make_params(2), make_batch(size=12))
    assert pipelined.num_compilations > compiled
    assert pipelined.plan == plan
    compiled = pipelined.num_compilations
    check(pipelined, loss_fn, make_params(2), make_batch())
    assert pipelined.num_compilations == compiled


def test_compile_from_types():
    def types(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    pipelined = make_pipelined()
    with pytest.raises(ValueError, match="call compile first"):
        _ = pipelined.plan
    assert pipelined.compile(types(make_params(1)), types(make_batch())) is pipelined
    compiled = pipelined.num_compilations
    check(pipelined, loss_fn, make_params(1), make_batch())
    assert pipelined.num_compilations == compiled


def test_decorated_function():
    """By default on all devices; eight layers fill them."""

    @jaxptis.pipeline(strategy="1f1b", num_microbatches=2)
    def loss(params, batch):
        return loss_fn(params, batch)

    value = loss.evaluate(make_params(6), make_batch())
    assert_close(value, loss_fn(make_params(6), make_batch()), rtol=RTOL)
    assert loss.plan.num_stages == len(jax.devices()) == 8


@pytest.mark.parametrize("batch_axes", [0, {"x": 0, "y": 0}, {"x": 0, "y": -2}])
def test_batch_axes(batch_axes):
    pipelined = make_pipelined(batch_axes=batch_axes)
    check(pipelined, loss_fn, make_params(1), make_batch())


def test_batch_axes_of_parts():
    """One axis for a whole subtree, None for another, and axes from behind."""

    def loss(params, batch):
        data, scale = batch["data"], batch["scale"]
        x = data["x"].T * scale["in"]
        return loss_fn(params, {"x": x, "y": data["y"].T}) * scale["out"]

    batch = make_batch()
    batch = {
        "data": {"x": batch["x"].T, "y": batch["y"].T},
        # Not an array: JAX takes Python's numbers too.
        "scale": {"in": normal(3, IN), "out": 3.0},
    }
    for axis in 1, -1:
        pipelined = make_pipelined(loss, batch_axes={"data": axis, "scale": None})
        check(pipelined, loss, make_params(1), batch)


def test_batch_axes_none():
    """Every microbatch is the whole batch, so the mean over them is that of one."""
    pipelined = make_pipelined(batch_axes=None)
    check(pipelined, loss_fn, make_params(1), make_batch(size=3))


def noisy_loss(params, batch):
    key = batch["key"] if jnp.issubdtype(batch["key"].dtype, jax.dtypes.prng_key) else None
    if key is None:  # raw keys, those of this microbatch
        (key,) = batch["key"]
    if key.shape == (1,):
        (key,) = key
    x = batch["x"] @ params["first"]
    for i, p in enumerate(params["blocks"]):
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, x.shape)
        x = block(p, jnp.where(keep, x, 0.0))
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


KEYS = {
    "a raw key a microbatch": (np.arange(8, dtype=np.uint32).reshape(4, 2), 0),
    "a typed key a microbatch": (functools.partial(jax.random.split, num=4), 0),
    "one typed key for all": (lambda key: key, None),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_in_the_batch(case):
    keys, axis = KEYS[case]
    keys = keys(jax.random.key(11)) if callable(keys) else keys
    params, data = make_params(1), make_batch()
    pipelined = make_pipelined(
        noisy_loss, num_microbatches=4, batch_axes={"x": 0, "y": 0, "key": axis}
    )
    value, grads = pipelined.value_and_grad(params, data | {"key": keys})

    def plain(params):
        losses = [
            noisy_loss(params, part | {"key": keys if axis is None else keys[m : m + 1]})
            for m, part in enumerate(microbatches(data, 4))
        ]
        return sum(losses) / 4

    wanted_value, wanted_grads = jax.value_and_grad(plain)(params)
    assert_close(value, wanted_value, rtol=RTOL)
    assert_close(grads, wanted_grads, rtol=RTOL)


def test_numpy_inputs():
    params, batch = jax.tree.map(np.asarray, (make_params(1), make_batch()))
    check(make_pipelined(), loss_fn, params, batch)


def test_numpy_inputs_may_be_overwritten_after_a_call():
    """A data loader fills the same arrays again. (`jax.jit` itself may still read them, on CPU.)"""

    def loss(params, batch):  # both stages read x, so it has two homes
        x = jnp.tanh(batch["x"] @ params["blocks"][0]["up"])
        return jnp.mean((x @ params["blocks"][0]["down"] - batch["x"]) ** 2)

    params = make_params(1)
    batch = {"x": np.array(normal(5, 4096, WIDTH))}
    wanted = jax.jit(jax.value_and_grad(loss))(params, {"x": batch["x"].copy()})
    pipelined = make_pipelined(loss).compile(params, batch)
    got = pipelined.value_and_grad(params, batch)
    batch["x"][:] = 0
    assert_close(got, wanted, rtol=RTOL)


def test_inputs_survive():
    """Nothing that the caller passes is donated, also where it is in place already."""
    pipelined = make_pipelined()
    params, batch = make_params(1), make_batch()
    first = pipelined.value_and_grad(params, batch)
    placed = jax.tree.map(lambda x, g: jax.device_put(x, g.sharding), params, first[1])
    for _ in range(2):
        again = pipelined.value_and_grad(placed, batch)
        jax.tree.map(np.testing.assert_array_equal, again, first)
    jax.tree.map(np.testing.assert_array_equal, placed, params)


# ---- Flax ---------------------------------------------------------------------------------------


class Linen(linen.Module):
    width: int = WIDTH

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.width)(x)
        x = x + linen.Dense(self.width)(jnp.tanh(linen.Dense(4 * self.width)(x)))
        return linen.Dense(OUT)(x)


class Outer(linen.Module):
    inner: type

    @linen.compact
    def __call__(self, x):
        return self.inner()(x)


class Nnx(nnx.Module):
    """A small model."""

    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(IN, width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, OUT, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(self.first(x))))


def model_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def test_nnx_model():
    model, batch = Nnx(WIDTH, rngs=nnx.Rngs(0)), make_batch()
    value, grads = make_pipelined(model_loss).value_and_grad(model, batch)
    wanted_value, wanted_grads = nnx.value_and_grad(model_loss)(model, batch)
    assert_close(value, wanted_value, rtol=RTOL)
    assert_close(grads, wanted_grads, rtol=RTOL)


def test_nnx_model_with_other_variables():
    """Running statistics that are only read, and dropout that is off."""

    class Model(Nnx):
        def __init__(self, *, rngs):
            super().__init__(WIDTH, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            x = self.dropout(self.norm(self.first(x)))
            return self.down(jnp.tanh(self.up(x)))

    model, batch = Model(rngs=nnx.Rngs(0)), make_batch()
    model.norm.mean[...] = normal(4, WIDTH)
    model.eval()
    pipelined = make_pipelined(model_loss)
    for _ in range(2):
        value, grads = pipelined.value_and_grad(model, batch)
        wanted_value, wanted_grads = nnx.value_and_grad(model_loss)(model, batch)
        assert_close(value, wanted_value, rtol=RTOL)
        assert_close(grads, wanted_grads, rtol=RTOL)
        model.norm.mean[...] = normal(5, WIDTH)  # new statistics count at the next call


def test_linen_class_behaves_as_before():
    decorated = make_pipelined(Linen)
    assert issubclass(decorated, Linen) and isinstance(decorated(), Linen)
    for name in "__name__", "__qualname__", "__module__", "__doc__":
        assert getattr(decorated, name) == getattr(Linen, name)
    x = make_batch()["x"]
    for make in lambda cls: cls(width=4), lambda cls: Outer(cls):
        plain, ours = make(Linen), make(decorated)
        variables = plain.init(jax.random.key(0), x)
        same = ours.init(jax.random.key(0), x)
        assert jax.tree.structure(variables) == jax.tree.structure(same)
        jax.tree.map(np.testing.assert_array_equal, variables, same)
        np.testing.assert_array_equal(ours.apply(variables, x), plain.apply(variables, x))
    assert decorated() == decorated() and hash(decorated()) == hash(decorated())
    assert decorated().clone(width=4).width == 4


def test_nnx_class_behaves_as_before():
    decorated = make_pipelined(Nnx)
    for name in "__name__", "__qualname__", "__module__", "__doc__":
        assert getattr(decorated, name) == getattr(Nnx, name)
    plain, ours = (cls(WIDTH, rngs=nnx.Rngs(0)) for cls in (Nnx, decorated))
    assert isinstance(ours, Nnx)
    x = make_batch()["x"]
    states = nnx.state(plain), nnx.state(ours)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(np.testing.assert_array_equal, *states)
    np.testing.assert_array_equal(ours(x), plain(x))
    jitted = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(jitted(ours, x), jitted(plain, x))
    again = nnx.merge(*nnx.split(ours))
    assert isinstance(again, decorated)
    np.testing.assert_array_equal(again(x), plain(x))


# ---- Plans --------------------------------------------------------------------------------------


def plan_of(layers, devices, num_microbatches, num_devices=None):
    """Return a plan in which every device runs its forwards, then its backwards, stage by stage."""
    rows = [[] for _ in range(num_devices or max(devices) + 1)]
    tasks = schedule("gpipe", num_devices=len(layers), num_microbatches=num_microbatches)
    for s, device in enumerate(devices):
        rows[device] += [task for task in tasks[s] if task.kind == "F"]
    for s in reversed(range(len(layers))):
        rows[devices[s]] += [task for task in tasks[s] if task.kind == "B"]
    stages = (StagePlan(layers=tuple(n), device=d) for n, d in zip(layers, devices, strict=True))
    return Plan(stages=tuple(stages), schedule=tuple(map(tuple, rows)))


SMALL_LAYERS = (("first",), ("blocks/0",), ("blocks/1", "head"))


@pytest.mark.parametrize(
    "devices",
    [(0, 1, 2), (2, 0, 1), (0, 1, 0), (1, 1, 0), (3, 1, 3)],
    ids=str,
)
def test_placements(devices):
    """Shuffled, two stages on one device (neighbours or not), a device without a stage."""
    plan = plan_of(SMALL_LAYERS, devices, num_microbatches=2, num_devices=4)
    pipelined = make_pipelined(num_devices=4, strategy=plan)
    grads = check(pipelined, loss_fn, make_params(2), make_batch())
    assert pipelined.plan == plan
    for leaf, stage in (grads["first"], 0), (grads["blocks"][0]["up"], 1), (grads["head"], 2):
        assert leaf.devices() == {jax.devices()[devices[stage]]}


def test_fewer_devices_in_the_plan_than_given():
    plan = plan_of(SMALL_LAYERS, (0, 1, 1), num_microbatches=2)
    check(make_pipelined(num_devices=4, strategy=plan), loss_fn, make_params(2), make_batch())


def chain_loss(params, batch):
    x = batch["x"]
    for p in params["layers"]:
        x = jnp.tanh(x @ p["w"])
    return jnp.mean((x - batch["y"]) ** 2)


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(seed):
    plan = random_plan(Random(seed), split=False)
    names = iter([f"layers/{i}" for i in range(len(plan.layers))])
    plan = dataclasses.replace(
        plan,
        stages=tuple(
            dataclasses.replace(stage, layers=tuple(next(names) for _ in stage.layers))
            for stage in plan.stages
        ),
    )
    params = {"layers": [{"w": matrix(i, WIDTH, WIDTH)} for i in range(len(plan.layers))]}
    batch = {"x": normal(50, 12, WIDTH), "y": normal(51, 12, WIDTH)}
    pipelined = make_pipelined(
        chain_loss, num_devices=4, num_microbatches=plan.num_microbatches, strategy=plan
    )
    check(pipelined, chain_loss, params, batch)


def test_plan_file(tmp_path, lenient):
    """What a trainer plans, a pipeline reads from a file, and both agree."""
    path = tmp_path / "plan.txt"
    trainer = make_pipelined(Nnx).trainer(WIDTH, loss=model_loss, optimizer=optax.sgd(0.1))
    state = trainer.init(jax.random.key(0), make_batch())
    trainer.plan.save(path)
    assert Plan.load(path) == Plan.parse(trainer.plan.text()) == trainer.plan
    want = trainer.evaluate(state, make_batch())["loss"]
    model = nnx.merge(state.graphdef, state.params, state.model_state)
    for strategy in str(path), path:
        pipelined = make_pipelined(model_loss, strategy=strategy)
        np.testing.assert_array_equal(pipelined.evaluate(model, make_batch()), want)
        assert pipelined.plan == trainer.plan


@pytest.mark.usefixtures("lenient")
def test_scalars_take_the_dtype_of_what_they_meet():
    """A Python number, and an array made from one, do not turn bfloat16 into float32."""

    def loss(params, batch):
        x = batch["x"].astype(jnp.bfloat16)
        for kernel in params["kernels"]:
            x = jnp.tanh(x @ kernel.astype(jnp.bfloat16))
        return jnp.mean(x * params["scale"] * batch["scale"])

    params = {"kernels": [matrix(i, 4, 4) for i in range(2)], "scale": jnp.full((), 2.0)}
    batch = {"x": normal(3, 4, 4), "scale": 3.0}
    pipelined = jaxptis.pipeline(
        loss,
        strategy="1f1b",
        num_microbatches=2,
        devices=jax.devices()[:2],
        batch_axes={"x": 0, "scale": None},
    )
    for scale in 2.0, np.float32(2.0):
        got = pipelined.value_and_grad({**params, "scale": scale}, batch)
        want = jax.value_and_grad(loss)({**params, "scale": scale}, batch)
        assert got[0].dtype == want[0].dtype
        assert_close(got[1]["kernels"], want[1]["kernels"], rtol=0.02)


@pytest.mark.parametrize(
    ("strategy", "num_microbatches"),
    [("1f1b", 4), ("zb-v", 4), ("1f1b", 1)],  # of one microbatch each task is the last that reads
)
def test_lowered_stages_are_those_that_run(strategy, num_microbatches, lenient):
    """With the same inputs donated, in a training step, too; nothing is compiled for them."""
    types = jax.eval_shape(lambda: (make_params(), make_batch()))
    pipelined = make_pipelined(strategy=strategy, num_microbatches=num_microbatches)
    lowered = pipelined.lower(*types)
    assert pipelined.num_compilations == 0
    texts = [
        {kind: program.as_text("stablehlo") for kind, program in stage.programs.items()}
        for stage in lowered
    ]
    kinds = {task.kind for row in pipelined.plan.schedule for task in row}
    assert {kind for stage in texts for kind in stage} == kinds
    assert any("tf.aliasing_output" in text for stage in texts for text in stage.values())

    def compiled():
        return [
            {kind: program.as_text("stablehlo") for kind, program in stage.programs.items()}
            for stage in pipelined.stages
        ]

    pipelined.compile(*types)
    assert compiled() == texts
    params, batch = make_params(), make_batch()
    step = pipelined.train_step(optax.sgd(0.1))
    step(step.init(params, batch), batch)
    assert compiled() == texts
