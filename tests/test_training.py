"""Ten steps of training through a pipeline equal ten plain optax steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxptis
from jaxptis.plan import StagePlan
from jaxptis.schedules import schedule
from tests.small_models import (
    HIDDEN,
    IN,
    OUT,
    WIDTH,
    assert_close,
    block,
    loss_fn,
    make_batch,
    make_params,
    normal,
)

NUM_STEPS = 10
CLIP_NORM = 1.0
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    # The norm is well above the limit (a test looks), so the gradients of all stages must meet.
    "clipped": optax.chain(
        optax.clip_by_global_norm(CLIP_NORM), optax.adamw(1e-2, eps=1e-4, weight_decay=0.1)
    ),
}
# Float32 sums in another order: 1e-7 a step, and Adam divides by the root of small numbers.
RTOL = 1e-5

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


def batches(num_steps=NUM_STEPS):
    return [make_batch(seed=1000 + 2 * step) for step in range(num_steps)]


def train_plainly(loss, optimizer, params, data):
    """Return parameters, optimizer state and losses after a plain loop over `data`."""

    @jax.jit
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = optimizer.init(params), []
    for batch in data:
        params, opt_state, value = step(params, opt_state, batch)
        losses.append(float(value))
    return params, opt_state, losses


def check_steps(step, state, loss, optimizer, params, data):
    """Take a step per batch, compare with a plain loop from `params`; return the last state."""
    losses = []
    for batch in data:
        state, metrics = step(state, batch)
        assert metrics.keys() == {"loss"}
        losses.append(float(metrics["loss"]))
    wanted_params, wanted_state, wanted_losses = train_plainly(loss, optimizer, params, data)
    assert state.step == len(data)
    assert_close(state.params, wanted_params, rtol=RTOL)
    for got, want in zip(
        by_moment(state.opt_state), by_moment(wanted_state), strict=True
    ):  # second moments are squares, so each has its own scale
        assert_close(got, want, rtol=RTOL)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(wanted_state)
    np.testing.assert_allclose(losses, wanted_losses, rtol=RTOL)
    return state


def by_moment(opt_state):
    adam = find_adam(opt_state)
    rest = jax.tree.map(
        lambda x: () if isinstance(x, optax.ScaleByAdamState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState),
    )
    return adam.count, adam.mu, adam.nu, rest


def find_adam(opt_state):
    (adam,) = (
        leaf
        for leaf in jax.tree.leaves(
            opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if isinstance(leaf, optax.ScaleByAdamState)
    )
    return adam


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


def device_sets(tree):
    return jax.tree.map(lambda leaf: leaf.sharding.device_set, tree)


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


def sharding_devices(leaf):
    return leaf.sharding.device_set


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


class Linen(linen.Module):
    width: int = WIDTH

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.width)(x)
        for _ in range(2):
            x = x + linen.Dense(self.width)(jnp.tanh(linen.Dense(HIDDEN)(x)))
        return linen.Dense(OUT)(x)


class NnxBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Nnx(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(IN, width, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(width, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, OUT, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for each in self.blocks:
            x = each(x)
        return self.head(x)


def model_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def decorate(cls):
    return jaxptis.pipeline(cls, strategy="1f1b", num_microbatches=4, devices=jax.devices()[:4])


def check_trainer(trainer, key, loss, params, optimizer):
    """Train as `trainer` and plainly; `params` is what it must start from."""
    data = batches()
    state = trainer.init(key, data[0])
    # The same random bits, made into numbers by another fusion of the same arithmetic.
    assert_close(state.params, params, rtol=1e-6)
    adam = find_adam(state.opt_state)
    places = device_sets(state.params)
    found = list(map(sharding_devices, jax.tree.leaves(state.params)))
    assert all(len(devices) == 1 for devices in found) and len(set().union(*found)) == 4
    assert device_sets(adam.mu) == places and device_sets(adam.nu) == places
    before = trainer.evaluate(state, data[0])["loss"]
    assert float(before) == pytest.approx(float(loss(params, data[0])), rel=RTOL)
    check_steps(trainer.step, state, loss, optimizer, params, data)
    assert trainer.num_tasks == 2 * 4 * 4  # forward and backward, stages, microbatches
    assert trainer.host_s_per_task > 0
    assert trainer.plan.num_stages == len(trainer.stages) == 4
    assert trainer.timeline.text()


def test_linen_class():
    optimizer = OPTIMIZERS["clipped"]
    model = decorate(Linen)()
    key = jax.random.key(5)
    trainer = model.trainer(loss=model_loss, optimizer=optimizer)
    plain = Linen()
    params = plain.init(key, batches(1)[0]["x"])["params"]

    def loss(params, batch):
        return model_loss(functools.partial(plain.apply, {"params": params}), batch)

    check_trainer(trainer, key, loss, params, optimizer)


def nnx_parts(key):
    graphdef, params = nnx.split(Nnx(WIDTH, rngs=nnx.Rngs(key)), nnx.Param)

    def loss(params, batch):
        return model_loss(nnx.merge(graphdef, params), batch)

    return loss, params


def test_nnx_class():
    optimizer = OPTIMIZERS["adamw"]
    key = jax.random.key(5)
    trainer = decorate(Nnx).trainer(WIDTH, loss=model_loss, optimizer=optimizer)
    loss, params = nnx_parts(key)
    check_trainer(trainer, key, loss, params, optimizer)


def test_nnx_instance():
    key = jax.random.key(6)
    model = decorate(Nnx)(WIDTH, rngs=nnx.Rngs(key))
    trainer = model.trainer(loss=model_loss, optimizer=OPTIMIZERS["adamw"])
    loss, params = nnx_parts(key)
    check_trainer(trainer, None, loss, params, OPTIMIZERS["adamw"])
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batches(1)[0])
    placed = nnx.to_pure_dict(trainer.init(None, types).params)
    jax.tree.map(np.testing.assert_array_equal, placed, nnx.to_pure_dict(params))
    # The instance keeps the parameters that it had.
    _, kept = nnx.split(model, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, kept, params)


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
