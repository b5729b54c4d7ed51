"""The peaks that the performance model predicts beside those of the executor's accounting."""

import jax
import numpy as np
import optax
import pytest

import jaxptis
from jaxptis.performance import simulate
from jaxptis.performance.estimate import estimate
from jaxptis.performance.optimizer_state import optimizer_state_bytes
from models import MODELS
from passes.layer_programs import layer_programs

B, T = 8, 64

pytestmark = pytest.mark.usefixtures("lenient", "compiled_quickly")


# Whole backwards; split ones; parameters that two devices share.
@pytest.mark.parametrize(
    ("name", "strategy", "num_devices"),
    [("llama2", "1f1b", 2), ("llama2", "zb-v", 2), ("gemma", "zb-h1", 4)],
)
def test_predicted_peaks_are_those_of_the_executor(name, strategy, num_devices):
    model = MODELS[name]
    config = model.sizes["tiny"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    pipeline = jaxptis.pipeline(
        num_microbatches=B, devices=jax.devices()[:num_devices], strategy=strategy, has_aux=True
    )
    trainer = pipeline(model.module)(config).trainer(
        loss=model.loss(config), optimizer=model.steer(optimizer)
    )
    state = trainer.init(jax.random.key(0), {"tokens": np.zeros((B, T + 1), np.int32)})

    analysis = trainer._pipelined.shown.pipeline.analysis
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    costs = estimate(
        layer_programs(analysis.graph),
        analysis.cluster.devices[0],
        state_bytes=optimizer_state_bytes(analysis.graph.program, types, model.steer(optimizer)),
    )
    predicted = simulate(trainer.plan, costs, analysis.cluster, blocking=True).memory
    for curve, accounted in zip(predicted, trainer.memory, strict=True):
        assert curve.peak_bytes == pytest.approx(accounted.peak_bytes, rel=0.05)
