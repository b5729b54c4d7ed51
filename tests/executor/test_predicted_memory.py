"""The peaks that the performance model predicts beside those of the executor's accounting."""

import jax
import numpy as np
import optax
import pytest

import jaxptis
from models import MODELS

B, T = 8, 64

pytestmark = pytest.mark.usefixtures("lenient")


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
    trainer.init(jax.random.key(0), {"tokens": np.zeros((B, T + 1), np.int32)})
    for curve, accounted in zip(trainer.timeline.memory, trainer.memory, strict=True):
        assert curve.peak_bytes == pytest.approx(accounted.peak_bytes, rel=0.05)
