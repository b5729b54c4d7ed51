"""What a pipeline cannot do is refused: what is wrong, the numbers, and what to change."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.experimental import io_callback
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxptis
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import FAMILIES, schedule
from tests.small_models import IN, OUT, WIDTH, loss_fn, make_batch, make_params


def make_pipelined(loss=loss_fn, *, num_devices=2, num_microbatches=2, **options):
    return jaxptis.pipeline(
        loss,
        num_microbatches=num_microbatches,
        devices=jax.devices()[:num_devices],
        **{"strategy": "1f1b", **options},
    )


def refuse(message, pipelined, params=None, batch=None):
    """Check that gradients and evaluation are refused with `message`, an expression."""
    params = make_params(1) if params is None else params
    batch = make_batch() if batch is None else batch
    for call in pipelined.value_and_grad, pipelined.evaluate:
        with pytest.raises(ValueError, match=message):
            call(params, batch)


def plain_plan(*layers, num_microbatches=2):
    """Return a plan with one stage a device."""
    return Plan(
        stages=tuple(StagePlan(layers=names, device=d) for d, names in enumerate(layers)),
        schedule=schedule("1f1b", num_devices=len(layers), num_microbatches=num_microbatches),
    )


# ---- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe"])
def test_more_stages_than_layers(strategy):
    refuse(
        "^3 layers cannot fill 4 stages.*; pass 3 devices or fewer",
        make_pipelined(num_devices=4, strategy=strategy),
    )


def test_batch_that_microbatches_do_not_divide():
    pipelined = make_pipelined(num_microbatches=3)
    refuse(
        r"batch leaf \['x'\] has shape \(8, 3\): 3 microbatches do not divide its batch of 8; "
        "change the batch or num_microbatches",
        pipelined,
    )
    refuse(r"do not divide its batch of 2", pipelined, batch=make_batch(size=2))
    refuse(r"do not divide its batch of 0", pipelined, batch=make_batch(size=0))


def test_batch_axes_that_do_not_fit():
    refuse(
        r"batch leaf \['x'\] has shape \(8, 3\), so it has no batch axis 2; give its axis in "
        "batch_axes, or None",
        make_pipelined(batch_axes={"x": 2, "y": 0}),
    )
    refuse(r"no batch axis -3", make_pipelined(batch_axes=-3))
    refuse(r"batch_axes \{'x': 0\} is no prefix of the batch", make_pipelined(batch_axes={"x": 0}))
    batch = make_batch() | {"scale": jnp.float32(2)}
    refuse(r"\['scale'\] has shape \(\), so it has no batch axis 0", make_pipelined(), batch=batch)


@pytest.mark.parametrize("number", [0, -1])
def test_microbatches_below_one(number):
    with pytest.raises(ValueError, match=f"num_microbatches is {number}; use 1 or more"):
        make_pipelined(num_microbatches=number)


def test_devices_given_twice():
    first, second = jax.devices()[:2]
    pipelined = jaxptis.pipeline(
        loss_fn, strategy="1f1b", num_microbatches=2, devices=[first, second, first]
    )
    refuse("3 devices are given, 2 of them different; give each device once", pipelined)
    pipelined = jaxptis.pipeline(loss_fn, strategy="1f1b", num_microbatches=2, devices=[])
    refuse("0 devices are given, 0 of them different; .* at least one", pipelined)


# ---- The loss -----------------------------------------------------------------------------------


def test_loss_that_is_not_a_scalar():
    def loss(params, batch):
        return (batch["x"] @ params["first"]).sum(axis=-1)

    refuse(
        r"the loss must be a scalar, but it has shape \(4,\); return its mean",
        make_pipelined(loss),
    )


def test_loss_that_is_not_a_float():
    def loss(params, batch):
        return jnp.argmax(batch["x"] @ params["first"])

    refuse("the loss must be a float, but it has dtype int32", make_pipelined(loss))


def test_pair_without_has_aux():
    def loss(params, batch):
        return loss_fn(params, batch), jnp.float32(0)

    refuse(
        r"the loss must be one scalar, but .* PyTreeDef\(\(\*, \*\)\); return a scalar, or "
        r"\(scalar, aux\) with has_aux=True",
        make_pipelined(loss),
    )


def test_has_aux_without_a_pair():
    refuse(
        r"has_aux=True needs a function that returns \(loss, aux\).* return a pair or drop has_aux",
        make_pipelined(has_aux=True),
    )


def test_integer_output_without_a_batch_axis():
    def loss(params, batch):
        return loss_fn(params, batch), {"size": jnp.int32(len(batch["x"]))}

    refuse(
        r"auxiliary output \['size'\] has dtype int32 and no batch axis.* return a float mean, or "
        "one value a sample",
        make_pipelined(loss, has_aux=True),
    )


def test_output_that_grows_otherwise_than_the_batch():
    def loss(params, batch):
        x = batch["x"] @ params["first"]
        return loss_fn(params, batch), {"products": x @ x.T}

    refuse(
        r"auxiliary output \['products'\] has shape \(4, 4\) for a microbatch and \(8, 8\) for "
        "the batch; one axis must be 2 times as long",
        make_pipelined(loss, has_aux=True),
    )


def test_integer_parameter():
    refuse(
        r"parameter step has dtype int32, which has no gradient; pass it in the batch",
        make_pipelined(),
        params=make_params(1) | {"step": jnp.int32(0)},
    )


def test_loss_without_parameters_or_without_the_batch():
    for loss in (
        lambda params, batch: jnp.mean(batch["x"]),
        lambda params, batch: jnp.mean(params["first"]),
    ):
        refuse(
            "the loss does not depend on both the parameters and the batch", make_pipelined(loss)
        )


def print_it(x):
    jax.debug.print("{}", x.sum())
    return x


def print_in_a_loop(x):
    return jax.lax.scan(lambda x, _: (print_it(x), None), x, length=2)[0]


def call_back(x, ordered):
    io_callback(lambda x: None, None, x, ordered=ordered)
    return x


SIDE_EFFECTS = {
    "jax.debug.print": print_it,
    "jax.debug.print in a scan": print_in_a_loop,
    "jax.debug.print in a jit": jax.jit(print_it),
    "io_callback": functools.partial(call_back, ordered=False),
    "io_callback, ordered": functools.partial(call_back, ordered=True),
}


@pytest.mark.parametrize("effect", SIDE_EFFECTS)
def test_side_effect(effect):
    def loss(params, batch):
        x = SIDE_EFFECTS[effect](batch["x"] @ params["first"])
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    place = re.escape(__file__)
    refuse(
        rf"the loss function has a side effect, \w+ at {place}:\d+.*; .* remove it, or return the "
        "value with has_aux=True",
        make_pipelined(loss),
    )


def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("data",))


def constrain(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), PartitionSpec("data")))


def shard(x):
    spec = PartitionSpec("data")
    return jax.shard_map(jnp.tanh, mesh=mesh(), in_specs=spec, out_specs=spec)(x)


def put(x):
    return jax.device_put(x, jax.devices()[1])


@pytest.mark.parametrize(
    ("bind", "name"),
    [(constrain, "sharding_constraint"), (shard, "shard_map"), (put, "device_put")],
)
def test_primitive_bound_to_devices(bind, name):
    def loss(params, batch):
        x = jax.jit(bind)(batch["x"] @ params["first"])
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    place = re.escape(__file__)
    refuse(
        f"^{name} at {place}:.* cannot be cut into stages; remove it, jaxptis places every value",
        make_pipelined(loss),
    )


def test_loop_without_a_reverse():
    def loss(params, batch):
        x = batch["x"] @ params["first"]
        x = jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x + 1, x)
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    with pytest.raises(ValueError, match=rf"while at {re.escape(__file__)}:.*use jax\.lax\.scan"):
        make_pipelined(loss).value_and_grad(make_params(1), make_batch())


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe"])
def test_nan_is_not_hidden(strategy):
    """NaN in one sample of the last microbatch is NaN in the loss and in all gradients."""
    batch = make_batch()
    batch["x"] = batch["x"].at[-1, 0].set(jnp.nan)
    value, grads = make_pipelined(strategy=strategy).value_and_grad(make_params(1), batch)
    assert np.isnan(value)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(grads))
    assert np.isnan(make_pipelined(strategy=strategy).evaluate(make_params(1), batch))


def test_nan_trains_on(lenient):
    batch = make_batch()
    batch["x"] = batch["x"].at[-1, 0].set(jnp.nan)
    step = make_pipelined().train_step(optax.adamw(1e-2))
    state, metrics = step(step.init(make_params(1), batch), batch)
    assert np.isnan(metrics["loss"])
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(state.params))


# ---- Plans --------------------------------------------------------------------------------------


def test_too_few_devices_for_a_plan():
    plan = plain_plan(("first",), ("blocks/0",), ("head",))
    refuse(
        "the plan needs 3 devices, but 2 are given; pass more devices or use another plan",
        make_pipelined(strategy=plan),
    )


def test_plan_of_another_model():
    refuse(
        "the plan is for another model: its layer 2 is 'tail', the model's is 'head' "
        r"\(the plan has 3 layers, the model 3\); use a plan of this model",
        make_pipelined(strategy=plain_plan(("first", "blocks/0"), ("tail",))),
    )
    refuse(
        r"its layer 2 is None, the model's is 'head' \(the plan has 2 layers, the model 3\)",
        make_pipelined(strategy=plain_plan(("first",), ("blocks/0",))),
    )


def test_plan_of_other_microbatches():
    plan = plain_plan(("first", "blocks/0"), ("head",), num_microbatches=4)
    refuse(
        "the plan has 4 microbatches, but num_microbatches is 2; make them equal",
        make_pipelined(strategy=plan),
    )


def test_plan_without_a_backward():
    plan = plain_plan(("first", "blocks/0", "head")).forward_only()
    with pytest.raises(ValueError, match="the plan has forwards only; give every stage"):
        make_pipelined(strategy=plan).value_and_grad(make_params(1), make_batch())


@pytest.mark.parametrize(
    ("old", "new", "place", "wrong"),
    [
        ("0F1", "0G1", "9:15", "bad task: found '0G1', expected <stage><KIND><microbatch>"),
        ("plan 1", "plan 9", "1:14", "unknown version: found '9'"),
        ("on device 1", "at device 1", "6:9", "bad stage line: found 'at'"),
    ],
)
def test_malformed_plan_file(tmp_path, old, new, place, wrong):
    text = plain_plan(("first", "blocks/0"), ("head",)).text()
    path = tmp_path / "my.plan"
    path.write_text(text.replace(old, new, 1))
    line, column = map(int, place.split(":"))
    found = re.search(r"found '(.*?)'", wrong)[1]
    # The numbers are those of the planted word.
    line_text = path.read_text().splitlines()[line - 1]
    assert line_text[column - 1 :].startswith(found)
    refuse(
        rf"^{re.escape(str(path))}:{place}: {re.escape(wrong)}",
        make_pipelined(strategy=str(path)),
    )


def test_strategy_that_is_not_known():
    refuse(
        f"strategy '1f1p' is neither a schedule \\({', '.join(FAMILIES)}, best, "
        "adaptis, mist\\) nor the path of "
        r"a plan file that can be read \(.*No such file.*\); did you mean '1f1b'\? "
        r"change it, or write the file with plan.save\(path\)",
        make_pipelined(strategy="1f1p"),
    )
    refuse(r"did you mean 'v-half'\?", make_pipelined(strategy="v_half(x=2)"))


@pytest.mark.parametrize("strategy", [Path(__file__).parent, 42, None])
def test_strategy_that_is_neither_a_name_nor_a_file(strategy):
    refuse(f"strategy.*{re.escape(str(strategy))}", make_pipelined(strategy=strategy))


# ---- Flax ---------------------------------------------------------------------------------------


def model_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


class NnxDropout(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(IN, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.first(x)))


class NnxNorm(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(IN, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.first(x)))


class NnxNew(nnx.Module):
    """Makes a variable when it is called."""

    def __init__(self, *, rngs):
        self.first = nnx.Linear(IN, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, x):
        hidden = self.first(x)
        self.seen = nnx.Intermediate(jnp.mean(hidden))
        return self.head(hidden)


CHANGES = {"dropout/rngs/count": NnxDropout, "norm/mean": NnxNorm, "seen": NnxNew}


@pytest.mark.parametrize("path", CHANGES)
def test_nnx_loss_that_changes_the_model(path, lenient):
    cls = CHANGES[path]
    message = f"the loss changes the model's variable {path}.*eval mode.*in the batch"
    refuse(message, make_pipelined(model_loss), params=cls(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        trainer = make_pipelined(cls).trainer(loss=model_loss, optimizer=optax.sgd(0.1))
        trainer.init(jax.random.key(0), make_batch())


class LinenNorm(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(linen.Dense(WIDTH)(x))
        return linen.Dense(OUT)(x)


def test_linen_batch_stats():
    trainer = make_pipelined(LinenNorm)().trainer(loss=model_loss, optimizer=optax.sgd(0.1))
    message = "the model has collections batch_stats beside its parameters; a pipeline trains"
    with pytest.raises(ValueError, match=message):
        trainer.init(jax.random.key(0), make_batch())


class LinenDense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(OUT)(linen.Dense(WIDTH)(x))


def test_loss_that_never_calls_the_model():
    def loss(model, batch):
        return jnp.mean(batch["x"])

    trainer = make_pipelined(LinenDense)().trainer(loss=loss, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"the loss never calls the model .* call model\(inputs\)"):
        trainer.init(jax.random.key(0), make_batch())


class LinenTrainer(LinenDense):
    def trainer(self):
        return None


class LinenTrainerField(LinenDense):
    trainer: int


class NnxTrainer(NnxNew):
    trainer = None


@pytest.mark.parametrize("cls", [LinenTrainer, LinenTrainerField, NnxTrainer])
def test_class_with_an_attribute_named_trainer(cls):
    message = f"{cls.__name__} has an attribute 'trainer', which pipeline would hide; rename it"
    with pytest.raises(ValueError, match=message):
        make_pipelined(cls)


@pytest.mark.parametrize("make", [LinenDense, lambda: NnxNew(rngs=nnx.Rngs(0)), lambda: 3])
def test_neither_a_function_nor_a_class(make):
    with pytest.raises(ValueError, match=r"takes a loss function or a Flax module class, not .*;"):
        make_pipelined(make())


def test_keys_of_a_trainer():
    trainer = make_pipelined(LinenDense)().trainer(loss=model_loss, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"drawn with a key; call init\(key, batch\)"):
        trainer.init(None, make_batch())
    model = make_pipelined(NnxDropout)(rngs=nnx.Rngs(0))
    trainer = model.trainer(loss=model_loss, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"has its parameters; call init\(None, batch\)"):
        trainer.init(jax.random.key(0), make_batch())


def test_parameters_of_another_model():
    trainer = make_pipelined(LinenDense)().trainer(loss=model_loss, optimizer=optax.sgd(0.1))
    wrong = {
        "Dense_0": {"kernel": jnp.ones((OUT, WIDTH)), "bias": jnp.ones(OUT)},
        "Dense_1": {"kernel": jnp.ones((IN, WIDTH)), "scale": jnp.ones(WIDTH)},
    }
    with pytest.raises(ValueError) as raised:
        trainer.init_from(wrong, make_batch())
    assert str(raised.value) == (
        "these are not the parameters of this model: Dense_0/kernel has shape (2, 16), in the "
        "model (16, 2); Dense_1/bias is missing; the model has no Dense_1/scale; pass a tree like "
        "module.init(...)['params']"
    )
    trainers = [
        make_pipelined(NnxNew).trainer(loss=model_loss, optimizer=optax.sgd(0.1)),
        make_pipelined(NnxNew)(rngs=nnx.Rngs(0)).trainer(loss=model_loss, optimizer=optax.sgd(0.1)),
    ]
    for trainer in trainers:
        with pytest.raises(ValueError, match="init_from is for linen modules; an nnx model brings"):
            trainer.init_from(wrong, make_batch())
