"""Ten steps of training through a pipeline equal ten plain optax steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxptis
from jaxptis.plan import StagePlan
from jaxptis.schedules import schedule
from tests.plain_training import (
    CLIP_NORM,
    NUM_STEPS,
    OPTIMIZERS,
    RTOL,
    batches,
    check_steps,
    device_sets,
    find_adam,
    sharding_devices,
)
from tests.small_models import (
    HIDDEN,
    OUT,
    WIDTH,
    assert_close,
    block,
    loss_fn,
    make_batch,
    make_params,
    normal,
)

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request):
    return OPTIMIZERS[request.param]


def make_pipelined(loss=loss_fn, **options):
    return jaxptis.pipeline(
        loss, num_microbatches=4, devices=jax.devices()[:4], **{"strategy": "1f1b", **options}
    )


@functools.cache
def plain_pipelined():
    """The pipeline of `loss_fn`, compiled once for all the tests that only look at its states."""
    return make_pipelined()


def devices_of(plan, *layers):
    """Return the devices of the stages that hold `layers`."""
    found = {
        jax.devices()[stage.device]
        for layer in layers
        for stage in plan.stages
        if layer in stage.layers
    }
    assert found, layers
    return found


def assert_copies_equal(leaf, num_copies):
    copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
    assert len(copies) == num_copies
    assert len(set(copies)) == 1


def test_best_leaves_devices_empty_where_layers_are_too_few():
    pipelined = make_pipelined(strategy="best")
    train(pipelined, loss_fn, OPTIMIZERS["clipped"], make_params(num_blocks=1))
    assert pipelined.plan.layers == ("first", "blocks/0", "head")
    assert min(map(len, pipelined.plan.schedule)) == 0
    assert min(device.peak_bytes for device in pipelined.memory) == 0


def train(pipelined, loss, optimizer, params):
    """Train `params` through four devices; returns the last state."""
    data = batches()
    step = pipelined.train_step(optimizer)
    first = step.init(params, data[0])
    places = device_sets((first.params, first.opt_state))
    last = check_steps(step, first, loss, optimizer, params, data)
    assert device_sets((last.params, last.opt_state)) == places  # nothing wanders
    return last


def test_ten_steps(optimizer):
    state = train(plain_pipelined(), loss_fn, optimizer, make_params())
    plan = plain_pipelined().plan
    adam = find_adam(state.opt_state)
    for tree in state.params, adam.mu, adam.nu:
        for name in "first", "head":
            assert tree[name].sharding.device_set == devices_of(plan, name)
        for i, leaves in enumerate(tree["blocks"]):
            for leaf in leaves.values():
                assert leaf.sharding.device_set == devices_of(plan, f"blocks/{i}")
    assert len(set().union(*map(sharding_devices, jax.tree.leaves(state.params)))) == 4


def test_clipping_is_active():
    grads = jax.grad(loss_fn)(make_params(), batches()[0])
    assert optax.tree.norm(grads) > 2 * CLIP_NORM


def test_parameter_of_two_stages():
    """The first and the last layer read one embedding."""

    def tied_loss(params, batch):
        x = batch["y"] @ params["embedding"]
        for p in params["blocks"]:
            x = block(p, x)
        return jnp.mean((x @ params["embedding"].T - batch["y"]) ** 2)

    params = {"embedding": normal(7, OUT, WIDTH), "blocks": make_params()["blocks"]}
    pipelined = make_pipelined(tied_loss)
    state = train(pipelined, tied_loss, OPTIMIZERS["clipped"], params)
    homes = {jax.devices()[pipelined.plan.stages[i].device] for i in (0, -1)}
    check_shared(state, "embedding", homes, 2)


def test_parameter_of_three_stages():
    """Blocks 0, 1 and 3 add one bias to their hidden values."""

    def shared_loss(params, batch):
        x = batch["x"] @ params["first"]
        for i, p in enumerate(params["blocks"]):
            bias = 0.0 if i == 2 else params["shared"]
            x = x + jnp.tanh(x @ p["up"] + bias) @ p["down"]
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    layers = (("first", "blocks/0"), ("blocks/1",), ("blocks/2",), ("blocks/3", "head"))
    plan = jaxptis.Plan(
        stages=tuple(StagePlan(layers=names, device=i) for i, names in enumerate(layers)),
        schedule=schedule("1f1b", num_devices=4, num_microbatches=4),
    )
    params = make_params(4) | {"shared": normal(7, HIDDEN)}
    pipelined = make_pipelined(shared_loss, strategy=plan)
    state = train(pipelined, shared_loss, OPTIMIZERS["clipped"], params)
    check_shared(state, "shared", devices_of(plan, "blocks/0", "blocks/1", "blocks/3"), 3)


def check_shared(state, name, homes, num_homes):
    """Check that the parameter `name` has equal copies just where it is read."""
    assert len(homes) == num_homes
    assert state.params[name].sharding.device_set == homes
    adam = find_adam(state.opt_state)
    for leaf in state.params[name], adam.mu[name], adam.nu[name]:
        assert leaf.sharding.device_set <= homes
        copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        assert len(copies) == leaf.sharding.num_devices
        assert len(set(copies)) == 1


def test_unused_parameter():
    params = make_params() | {"unused": normal(8, 3, 3)}
    pipelined = make_pipelined()
    state = train(pipelined, loss_fn, OPTIMIZERS["adamw"], params)
    # Its gradient is zero, so weight decay alone moves it: by lr * decay a step.
    decayed = params["unused"] * (1 - 1e-2 * 0.1) ** NUM_STEPS
    np.testing.assert_allclose(state.params["unused"], decayed, rtol=1e-6)
    first = {jax.devices()[pipelined.plan.stages[0].device]}
    assert state.params["unused"].sharding.device_set == first


def test_the_callers_parameters_survive():
    data = batches(2)
    step = plain_pipelined().train_step(OPTIMIZERS["adamw"])
    # Already in place: a step must not consume them nevertheless.
    placed = step.init(make_params(), data[0]).params
    before = jax.tree.map(np.array, placed)
    state = step.init(placed, data[0])
    for batch in data:
        state, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, placed, before)


def test_a_state_is_consumed():
    data = batches(2)
    step = plain_pipelined().train_step(OPTIMIZERS["adamw"])
    old = step.init(make_params(), data[0])
    step(old, data[0])
    moments = find_adam(old.opt_state)
    for leaf in jax.tree.leaves([old.params, moments.mu, moments.nu]):
        assert leaf.is_deleted()
    with pytest.raises(ValueError, match="the state was consumed by an earlier step; use the"):
        step(old, data[1])


def average_of_parameters(decay=0.9):
    """Keep a moving average of the parameters, which starts as the parameters themselves."""

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        return updates, jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state, new)

    return optax.GradientTransformation(lambda params: params, update)


def test_state_that_starts_as_the_parameters():
    optimizer = optax.chain(optax.adamw(1e-2), average_of_parameters())
    train(plain_pipelined(), loss_fn, optimizer, make_params())


def momentum_kept_twice():
    """Two leaves of the state are one value, and both are read."""

    def init(params):
        return optax.tree.zeros_like(params), optax.tree.zeros_like(params)

    def update(updates, state, params):
        new = jax.tree.map(lambda a, b, g: 0.4 * a + 0.5 * b + g, *state, updates)
        return new, (new, new)

    return optax.GradientTransformation(init, update)


def test_state_that_holds_a_value_twice():
    optimizer = optax.chain(optax.adamw(1e-2), momentum_kept_twice())
    train(plain_pipelined(), loss_fn, optimizer, make_params())


def test_init_from_types():
    data = batches(1)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data[0])
    step = plain_pipelined().train_step(OPTIMIZERS["adamw"])
    state = step.init(make_params(), types)
    check_steps(step, state, loss_fn, OPTIMIZERS["adamw"], make_params(), data)


def test_auxiliary_output_among_the_metrics():
    def loss(params, batch):
        value = loss_fn(params, batch)
        return value, {"twice": 2 * value}

    data = batches(1)
    step = make_pipelined(loss, has_aux=True).train_step(OPTIMIZERS["adamw"])
    state = step.init(make_params(), data[0])
    evaluated = step.evaluate(state, data[0])
    _, metrics = step(state, data[0])
    for got in evaluated, metrics:
        want = float(loss_fn(make_params(), data[0]))
        assert float(got["loss"]) == pytest.approx(want, rel=RTOL)
        assert float(got["aux"]["twice"]) == pytest.approx(2 * want, rel=RTOL)


def test_bfloat16_parameters():
    """Against a plain loop that also sums the gradients of microbatches in float32."""
    optimizer = optax.sgd(0.02, momentum=0.9)

    def loss(params, batch):
        x = batch["x"].astype(jnp.bfloat16) @ params["first"]
        for p in params["blocks"]:
            x = block(p, x)
        errors = (x @ params["head"]).astype(jnp.float32) - batch["y"]
        return jnp.mean(errors**2)

    def plain_step(params, opt_state, batch):
        parts = [jax.tree.map(lambda x, m=m: x[2 * m : 2 * m + 2], batch) for m in range(4)]
        grads = [jax.grad(loss)(params, part) for part in parts]
        mean = jax.tree.map(
            lambda *g: (sum(x.astype(jnp.float32) for x in g) / 4).astype(jnp.bfloat16), *grads
        )
        updates, opt_state = optimizer.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    batch = make_batch()
    step = make_pipelined(loss).train_step(optimizer)
    state = step.init(params, batch)
    opt_state = optimizer.init(params)
    losses = []
    for _ in range(NUM_STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        params, opt_state = jax.jit(plain_step)(params, opt_state, batch)
    # A bfloat16 has 8 bits; an activation rounded the other way moves a parameter by its last bit.
    assert_close(state.params, params, rtol=2 * 2**-8)
    assert losses[-1] < losses[0] / 2
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
