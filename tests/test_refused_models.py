"""Models of Flax that cannot be trained are refused: why, and what to change."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from tests.small_models import IN, OUT, WIDTH, make_batch
from tests.small_pipelines import make_pipelined, model_loss, refuse


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
