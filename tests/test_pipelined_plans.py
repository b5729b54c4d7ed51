"""Any plan gives what the plain function gives."""

import dataclasses
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.random_plan import random_plan
from jaxptis.plan import Plan
from tests.small_models import WIDTH, loss_fn, make_batch, make_params, matrix, normal
from tests.small_pipelines import Nnx, check, make_pipelined, model_loss, plan_of

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


def test_a_plan_is_kept_when_its_file_is_gone(tmp_path):
    """Other shapes have the same layers, and so the same plan."""
    path = tmp_path / "plan.txt"
    plan_of(SMALL_LAYERS, (0, 1, 0), num_microbatches=2).save(path)
    pipelined = make_pipelined(strategy=path)
    check(pipelined, loss_fn, make_params(2), make_batch())
    path.unlink()
    check(pipelined, loss_fn, make_params(2), make_batch(size=4))
