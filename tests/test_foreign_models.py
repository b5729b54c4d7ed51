"""The pipeline's gradients are those of plain JAX, on models that nobody here wrote."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxptis
from jaxptis.schedules import FAMILIES
from passes.cut_stages import cut_stages
from tests import foreign_models
from tests.foreign_models.foreign_model import B, D, T
from tests.passes.on_host import layers_of

NUM_MICROBATCHES = 4
SEEDS = (1, 2)
# Every model on two and on four devices in one schedule; two very different ones in every schedule.
# Dropout is all that is new in its models; two devices are enough to see it.
CASES = [
    (name, num_devices, family)
    for name in foreign_models.MODELS  # all of one model together: they compile much in common
    for num_devices in (2, 4)
    for family in FAMILIES
    if (family == "1f1b" and (num_devices == 2 or "dropout" not in name))
    or (num_devices == 2 and name in ("t5", "gemma3"))
]

pytestmark = [
    pytest.mark.usefixtures("lenient"),
    *foreign_models.WARNINGS,
]


@functools.cache
def model(name):
    return foreign_models.MODELS[name]()


@functools.cache
def pipelined(name, num_devices, strategy):
    return jaxptis.pipeline(
        model(name).loss,
        num_microbatches=NUM_MICROBATCHES,
        devices=jax.devices()[:num_devices],
        strategy=strategy,
        batch_axes=model(name).batch_axes,
    )


@functools.cache
def plain(name):
    return jax.jit(jax.value_and_grad(model(name).loss))


def reference(name, params, batch):
    """Return what plain JAX makes of the batch."""
    if model(name).batch_axes == 0:
        return jax.device_get(plain(name)(params, batch))
    # Every microbatch draws alike, which the whole batch cannot: the mean is what is promised.
    parts = [{**batch, "ids": ids} for ids in np.split(batch["ids"], NUM_MICROBATCHES)]
    results = [jax.device_get(plain(name)(params, part)) for part in parts]
    return jax.tree.map(lambda *leaves: sum(leaves) / NUM_MICROBATCHES, *results)


@functools.cache
def references(name):
    return [reference(name, *model(name).draw(seed)) for seed in SEEDS]


def assert_same(actual, expected):
    """Compare losses and gradients; the whole model's largest gradient sets the scale."""
    (loss, grads), (expected_loss, expected_grads) = actual, expected
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)  # float32 sums in another order
    scale = largest(expected_grads)
    for (path, grad), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        assert grad.dtype == other.dtype == np.float32
        assert largest(np.asarray(grad) - other) < 1e-5 * scale, jax.tree_util.keystr(path)


def leaf_path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", foreign_models.MODELS)
def test_the_comparison_has_teeth(name):
    (loss, grads), (other_loss, other_grads) = references(name)
    assert abs(loss - other_loss) > 1e-3 * loss
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True
    ):
        # A wrong or a stale leaf would be seen: the tolerance is a hundredth of this, or less.
        is_seen = min(largest(leaf), largest(leaf - other)) > 1e-3 * largest(grads)
        assert is_seen != leaf_path(path).endswith(model(name).without_gradient), leaf_path(path)


@pytest.mark.parametrize("name", ["gpt2_dropout_keys", "gpt2_dropout_key"])
def test_dropout_is_on(name):
    params, batch = model(name).draw(SEEDS[0])
    (key,) = model(name).dropout
    other_loss, _ = reference(name, params, {**batch, key: batch[key] + np.uint32(1)})
    assert abs(other_loss - references(name)[0][0]) > 1e-3


@pytest.mark.parametrize(("name", "num_devices", "strategy"), CASES)
def test_gradients_are_those_of_plain_jax(name, num_devices, strategy):
    # Twice, with other weights and data: nothing of the first call may stay.
    for seed, expected in zip(SEEDS, references(name), strict=True):
        actual = pipelined(name, num_devices, strategy).value_and_grad(*model(name).draw(seed))
        assert_same(actual, expected)


@functools.cache
def layers(name):
    return layers_of(model(name).loss, *model(name).draw(SEEDS[0]))


@pytest.mark.parametrize("name", foreign_models.MODELS)
def test_each_block_is_one_or_two_layers(name):
    assert tuple(layer.name for layer in layers(name).layers) == model(name).layers


@pytest.mark.parametrize("name", foreign_models.MODELS)
def test_only_the_stream_and_what_passes_by_are_sent(name):
    """No mask, no position bias, no rotary table."""
    num_layers = len(model(name).layers)
    crossings = cut_stages(layers(name), range(num_layers + 1)).crossings
    stream = [(layer, (layer + 1,), (B, T, D)) for layer in range(num_layers - 1)]
    wanted = [(*ends, math.prod(shape)) for *ends, shape in (*stream, *model(name).passing)]
    sent = [[c.producer, c.consumers, c.aval.size] for c in crossings]
    assert sorted(sent) == sorted(map(list, wanted))


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_tied_embeddings_live_where_they_are_read(name, num_devices):
    params, batch = model(name).draw(SEEDS[0])
    pipeline = pipelined(name, num_devices, "1f1b")
    state = pipeline.train_step(optax.sgd(0.1)).init(params, batch)
    ends = {0, num_devices - 1}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        homes = {jax.devices().index(device) for device in leaf.devices()}
        if leaf_path(path).startswith(model(name).tied):
            assert homes == ends
            # Nothing else has the shape of the embedding.
            reads = [leaf.shape in _inputs(stage) for stage in pipeline.stages]
            assert reads == [stage in ends for stage in range(num_devices)]
        else:
            assert len(homes) == 1, jax.tree_util.keystr(path)


def _inputs(stage):
    return {aval.shape for aval in stage.forward.spec.in_avals}


@pytest.mark.parametrize("name", ["gemma3"])
def test_an_nnx_model_is_passed_directly(name):
    loss = model(name).module_loss
    pipeline = jaxptis.pipeline(
        loss, num_microbatches=NUM_MICROBATCHES, devices=jax.devices()[:2], strategy="1f1b"
    )
    step = nnx.jit(nnx.value_and_grad(loss))
    module = nnx.merge(model(name).structure, model(name).params)
    for seed in SEEDS:
        params, batch = model(name).draw(seed)
        nnx.update(module, params)
        assert_same(pipeline.value_and_grad(module, batch), jax.device_get(step(module, batch)))
