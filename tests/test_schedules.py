"""Every schedule, on every model: the loss and the gradients are those of the plain step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxptis.call import Call, Compiled
from jaxptis.cluster import Cluster
from jaxptis.compile import Analysis, build
from jaxptis.executor.compiled import Compiler
from jaxptis.make_plan import PLANNERS, make_plan
from jaxptis.schedules import FAMILIES
from models import MODELS as OURS
from models import next_token_loss
from tests import foreign_models
from tests.small_models import assert_close
from tests.small_pipelines import analysis_of

# As many microbatches as "dualpipe-v" demands on four devices, of one sequence each.
DEVICES = 4
NUM_MICROBATCHES = B = 2 * DEVICES
# With an embedding, two layers a block and a head there is a layer for each of two stages a device.
NUM_BLOCKS = 3
T, D, V = 4, 32, 48
SEEDS = (1, 2)

pytestmark = [
    pytest.mark.usefixtures("lenient"),
    *foreign_models.WARNINGS,
]


@dataclasses.dataclass(frozen=True)
class Model:
    """Maps parameters and tokens (B, T) to logits (B, T, V); and the package's own parameters."""

    logits: Callable[[Any, jax.Array], jax.Array]
    params: Any

    def loss(self, params, batch):
        return next_token_loss(functools.partial(self.logits, params), batch)

    def draw(self, seed):
        """Return parameters, every number of which is perturbed, and a batch."""
        random = np.random.default_rng(seed)

        def perturb(leaf):
            assert leaf.dtype == np.float32
            return np.asarray(leaf) + 0.1 * random.standard_normal(leaf.shape, np.float32)

        tokens = random.integers(0, V, size=(B, T + 1), dtype=np.int32)
        return jax.tree.map(perturb, self.params), {"tokens": tokens}

    @functools.cached_property
    def references(self):
        """For each seed what plain JAX makes of it."""
        plain = jax.jit(jax.value_and_grad(self.loss))
        return [jax.device_get(plain(*self.draw(seed))) for seed in SEEDS]

    @functools.cached_property
    def analysis(self) -> Analysis:
        """What all plans have in common."""
        params, batch = self.draw(0)
        return analysis_of(self.loss, params, batch, DEVICES, NUM_MICROBATCHES)

    @functools.cached_property
    def compiler(self):
        """One for all plans, so that equal stages are compiled once."""
        return Compiler(jax.devices()[:DEVICES])

    def plan(self, strategy, num_devices):
        return make_plan(
            self.analysis.costs,
            strategy,
            cluster=Cluster.of(jax.devices()[:num_devices]),
            num_microbatches=NUM_MICROBATCHES,
        )

    def check(self, plan):
        """Compare twice, with other weights and data: nothing of the first call may stay."""
        compiled = Compiled(build(self.analysis, plan), self.compiler)
        step = compiled.gradient_step
        for seed, (want, want_grads) in zip(SEEDS, self.references, strict=True):
            params, batch = self.draw(seed)
            leaves, structure = jax.tree.flatten(params)
            call = Call(compiled, structure, leaves, jax.tree.leaves(batch))
            outs = step.executable([*call.params_buffers(), *call.batch_buffers()])
            loss, grads = call.split(outs)
            # Sums in float32, in another order.
            assert_close(loss, want, rtol=1e-5)
            grads = jax.tree.unflatten(structure, step.placement.arrays(grads))
            assert_close(grads, want_grads, rtol=1e-5)


def llama2():
    """The tiny size of this repository."""
    entry = OURS["llama2"]
    module = entry.module(dataclasses.replace(entry.sizes["tiny"], num_blocks=NUM_BLOCKS))
    tokens = jnp.zeros((1, T), jnp.int32)
    return Model(
        lambda params, ids: module.apply({"params": params}, ids),
        jax.jit(module.init)(jax.random.key(0), tokens)["params"],
    )


def gpt2():
    """FlaxGPT2, whose embedding is also its head: on the first and the last stage's devices."""
    transformers = _package("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_layer=NUM_BLOCKS, n_head=4, n_positions=T
    )
    model = transformers.FlaxGPT2LMHeadModel(config, input_shape=(1, T), _do_init=False)
    return Model(
        lambda params, ids: model(ids, params=params).logits,
        jax.jit(lambda key: model.init_weights(key, (1, T)))(jax.random.key(0)),
    )


def qwen3():
    """Of tunix, in nnx; its masks and rotary tables are computed from the positions."""
    qwen3 = _package("tunix.models.qwen3.model")
    config = qwen3.ModelConfig(
        num_layers=NUM_BLOCKS,
        vocab_size=V,
        embed_dim=D,
        hidden_dim=D,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    structure, params = nnx.split(nnx.jit(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0)))())

    def logits(params, ids):
        positions = jnp.broadcast_to(jnp.arange(T), ids.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (*ids.shape, T))
        return nnx.merge(structure, params)(ids, positions, None, mask)[0]

    return Model(logits, params)


def _package(name):
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} is in the extra 'foreign'")


MODELS = {make.__name__: make for make in (llama2, gpt2, qwen3)}


@functools.cache
def model(name):
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_has_teeth(name):
    (loss, grads), (other_loss, other_grads) = model(name).references
    assert abs(loss - other_loss) > 1e-3 * loss
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for leaf, other in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        # A wrong or a stale leaf would be seen: the tolerance is a hundredth of this, or less.
        assert min(np.abs(leaf).max(), np.abs(leaf - other).max()) > 1e-3 * scale


@pytest.mark.parametrize("strategy", FAMILIES)
@pytest.mark.parametrize("num_devices", [2, DEVICES])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_plain_step(name, num_devices, strategy):
    plan = model(name).plan(strategy, num_devices)
    assert plan.num_devices == num_devices
    model(name).check(plan)


@pytest.mark.parametrize("strategy", PLANNERS)
def test_gradients_of_plans_that_are_searched(strategy):
    model("llama2").check(model("llama2").plan(strategy, DEVICES))


@pytest.mark.parametrize("strategy", FAMILIES)
def test_stages_that_recompute_all(strategy):
    check_recompute("all", strategy)


def test_stages_that_recompute_nothing():
    check_recompute("none", "zb-h1")


def check_recompute(recompute, strategy):
    plan = model("llama2").plan(strategy, 2)
    stages = tuple(dataclasses.replace(stage, recompute=recompute) for stage in plan.stages)
    model("llama2").check(dataclasses.replace(plan, stages=stages))
