"""Training that goes on in another order when a device has become slow."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import jaxptis
from jaxptis.adapt import adapt
from jaxptis.cluster import Cluster
from jaxptis.executor.executable import Executable
from jaxptis.performance import simulate
from jaxptis.profile import Profile, ProfileError
from jaxptis.train_step import TrainStep
from tests.small_models import loss_fn, make_batch, make_params

pytestmark = pytest.mark.usefixtures("compiled_quickly", "lenient")

NUM_DEVICES = 4


def make_step():
    pipelined = jaxptis.pipeline(
        loss_fn, num_microbatches=8, devices=jax.devices()[:NUM_DEVICES], strategy="hanayo"
    )
    step = pipelined.train_step(optax.adam(1e-2))
    return pipelined, step, step.init(make_params(8), make_batch())


def as_if_slow(pipeline, device):
    """Return a profile of the step as it would be with a device that is slowed threefold."""
    cluster = pipeline.analysis.cluster
    slow = (
        replace(spec, speed=spec.speed / 3 if i == device else spec.speed)
        for i, spec in enumerate(cluster.devices)
    )
    timeline = simulate(pipeline.plan, pipeline.analysis.costs, Cluster(tuple(slow)), blocking=True)
    return Profile(timeline=timeline, recorded_s=(1.0,), plain_s=(1.0,), clock_error_s=0.0)


def test_training_goes_on_in_another_order_without_compiling_a_stage(monkeypatch):
    pipelined, step, state = make_step()
    other, other_step, expected = make_step()
    old = pipelined.shown
    profile = as_if_slow(old.pipeline, 0)
    monkeypatch.setattr(
        TrainStep, "profile", lambda self, state, batch, num_steps: (state, profile)
    )
    state, adaptation = step.adapt(state, make_batch(), 1)
    assert adaptation.is_new
    assert adaptation.speeds[0] == pytest.approx(adaptation.speeds[1] / 3)
    assert pipelined.plan == adaptation.plan != other.plan
    assert pipelined.plan.stages == other.plan.stages
    assert adaptation.before_s == pytest.approx(profile.timeline.step_s)
    assert pipelined.timeline.step_s == adaptation.after_s < adaptation.before_s
    before, after = old.used.executable.programs, pipelined.shown.used.executable.programs
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    for _ in range(3):
        state, metrics = step(state, make_batch())
        expected, wanted = other_step(expected, make_batch())
        np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-6)
    assert pipelined.plan == adaptation.plan
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert adaptation.other == adaptation.plan  # costs are estimated


def test_what_other_stages_would_bring_is_said_if_costs_are_known():
    pipelined, _, _ = make_step()
    pipeline = pipelined.shown.pipeline
    costs = replace(pipelined.shown.used.costs, source="given")
    _, adaptation = adapt(pipeline, costs, as_if_slow(pipeline, 0))
    # The slow device would have fewer layers.
    assert adaptation.other_s < adaptation.after_s
    assert "other stages would take" in str(adaptation)


def test_the_state_is_not_lost_when_nothing_comes_of_measuring(monkeypatch):
    pipelined, step, state = make_step()
    before = pipelined.plan

    def cannot_tell():
        raise ValueError("this trace has no kernels")

    record = Executable.record
    monkeypatch.setattr(
        Executable, "record", lambda self, inputs: (record(self, inputs)[0], cannot_tell)
    )
    with pytest.raises(ProfileError, match="this trace has no kernels") as caught:
        step.adapt(state, make_batch(), 1)
    state, _ = step(caught.value.state, make_batch())
    assert state.step == 4
    assert pipelined.plan == before


def test_steps_are_measured_and_a_plan_that_is_good_stays():
    pipelined, step, state = make_step()
    compiled = pipelined.shown
    state, adaptation = step.adapt(state, make_batch(), 1)
    assert state.step == 3  # one that is not looked at, one recorded, one that is not
    assert adaptation.profile.timeline.step_s > 0
    assert (pipelined.shown is compiled) == (not adaptation.is_new)


def test_a_device_as_planned_is_not_called_slow():
    pipelined, _, _ = make_step()
    pipeline = pipelined.shown.pipeline
    timeline = pipeline.timeline
    profile = Profile(timeline=timeline, recorded_s=(1.0,), plain_s=(1.0,), clock_error_s=0.0)
    _, adaptation = adapt(pipeline, pipelined.shown.used.costs, profile)
    assert adaptation.speeds == pytest.approx([1.0] * NUM_DEVICES)
    assert adaptation.before_s == pytest.approx(timeline.step_s)
