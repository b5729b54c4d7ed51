"""Models of Flax in a pipeline, and classes that stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from tests.small_models import OUT, WIDTH, assert_close, make_batch, normal
from tests.small_pipelines import RTOL, Nnx, make_pipelined, model_loss


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
