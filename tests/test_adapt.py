"""Training that goes on in another order when a device has become slow."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest

import jaxptis
from experiments.compilations import counted_compilations
from jaxptis.adapt import adapt
from jaxptis.cluster import Cluster
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.executable import Executable
from jaxptis.executor.instructions import Rows
from jaxptis.executor.programs import ProgramSpec
from jaxptis.performance import simulate
from jaxptis.profile import Profile, ProfileError
from jaxptis.train_step import TrainStep
from tests.small_models import loss_fn, make_batch, make_params

pytestmark = pytest.mark.usefixtures("lenient")

NUM_DEVICES = 4


def make_step(strategy="hanayo"):
    pipelined = jaxptis.pipeline(
        loss_fn, num_microbatches=8, devices=jax.devices()[:NUM_DEVICES], strategy=strategy
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
    plan, costs = pipeline.plan, pipeline.analysis.costs
    slowed = Cluster(tuple(slow), cluster.link, cluster.links)
    timeline = simulate(plan, costs, slowed, blocking=True, placed_by=(costs, cluster))
    return Profile(timeline=timeline, recorded_s=(1.0,), plain_s=(1.0,), clock_error_s=0.0)


def splits_some(plan):
    """Return the plan with every other backward of each stage in two parts."""
    return replace(
        plan,
        schedule=tuple(
            tuple(
                part
                for task in row
                for part in (
                    [replace(task, kind="I"), replace(task, kind="W")]
                    if task.kind == "B" and task.microbatch % 2
                    else [task]
                )
            )
            for row in plan.schedule
        ),
    )


@pytest.mark.parametrize(
    ("strategy", "slow"), [("gpipe", 0), ("hanayo", 3), ("both kinds of backward", 0)]
)
def test_training_goes_on_in_another_order_without_a_compilation(strategy, slow, monkeypatch):
    if strategy == "both kinds of backward":
        pipelined, _, _ = make_step("gpipe")
        strategy = splits_some(pipelined.plan)
    pipelined, step, state = make_step(strategy)
    other, other_step, expected = make_step(strategy)
    old = pipelined.shown
    profile = as_if_slow(old.pipeline, slow)
    monkeypatch.setattr(
        TrainStep, "profile", lambda self, state, batch, num_steps: (state, profile)
    )
    step.evaluate(state, make_batch())
    state, _ = step(state, make_batch())
    with counted_compilations() as compiled:
        state, adaptation = step.adapt(state, make_batch(), 1)
        state, _ = step(state, make_batch())
        evaluated = step.evaluate(state, make_batch())["loss"]
    assert adaptation.is_new
    assert compiled == [] and adaptation.num_compilations == 0
    assert adaptation.speeds[slow] == pytest.approx(adaptation.speeds[1] / 3)
    assert pipelined.plan == adaptation.plan != other.plan
    assert pipelined.plan.stages == other.plan.stages
    assert adaptation.before_s == pytest.approx(profile.timeline.step_s)
    assert pipelined.timeline.step_s == adaptation.after_s < adaptation.before_s
    before, after = old.used.executable.programs, pipelined.shown.used.executable.programs
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    for _ in range(2):
        expected, _ = other_step(expected, make_batch())
    np.testing.assert_allclose(
        evaluated, other_step.evaluate(expected, make_batch())["loss"], rtol=1e-6
    )
    for _ in range(2):
        state, metrics = step(state, make_batch())
        expected, wanted = other_step(expected, make_batch())
        np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-6)
    assert pipelined.plan == adaptation.plan
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert adaptation.other == adaptation.plan  # costs are estimated


def test_back_in_the_first_order_nothing_is_compiled_either(monkeypatch):
    pipelined, step, state = make_step("gpipe")
    profiles = [as_if_slow(pipelined.shown.pipeline, 0)]
    monkeypatch.setattr(
        TrainStep, "profile", lambda self, state, batch, num_steps: (state, profiles[0])
    )
    state, _ = step(state, make_batch())
    with counted_compilations() as compiled:
        for device in range(NUM_DEVICES):
            profiles[0] = as_if_slow(pipelined.shown.pipeline, device)
            state, _ = step.adapt(state, make_batch(), 1)
            state, _ = step(state, make_batch())
    assert compiled == []


def test_an_order_that_needs_other_programs_is_refused():
    """A program that overwrites its input cannot run where something reads that afterwards."""
    aval = jax.ShapeDtypeStruct((2,), "float32")

    def double(x):
        return [2 * x]

    spec = ProgramSpec(
        kind="double",
        device=0,
        fun=double,
        in_avals=(aval,),
        out_avals=(aval,),
        jaxpr=jax.make_jaxpr(double)(aval),
    )
    make = partial(
        Executable,
        Compiler(jax.devices()[:1]),
        what="a step",
        specs={"double": spec},
        inputs={(0, "x"): aval},
        constants={},
        consumed=[(0, "x")],
    )
    once, twice = Rows(1), Rows(1)
    for rows, results in (once, "y"), (twice, "yz"):
        for name in results:
            rows.run(0, "double", ["x"], [name])
    step = make(rows=once, outputs=[(0, "y")])
    assert make(rows=once, outputs=[(0, "y")], like=step).programs is step.programs
    with pytest.raises(ValueError, match="double overwrites what is still read in another order"):
        make(rows=twice, outputs=[(0, "y"), (0, "z")], like=step)


def test_what_other_stages_would_bring_is_said_if_costs_are_known():
    pipelined, _, _ = make_step()
    pipeline = pipelined.shown.pipeline
    costs = replace(pipelined.shown.used.costs, source="given")
    _, adaptation = adapt(pipeline, costs, as_if_slow(pipeline, 0))
    # The slow device would have fewer layers.
    assert adaptation.other_s < adaptation.after_s
    assert "other stages would take" in str(adaptation)
    again = jaxptis.pipeline(
        loss_fn,
        num_microbatches=8,
        devices=jax.devices()[:NUM_DEVICES],
        strategy=adaptation.other,
        costs=adaptation.costs,
        cluster=adaptation.cluster,
    )
    again.lower(make_params(8), make_batch())
    assert again.timeline.step_s == pytest.approx(adaptation.other_s)


def test_transfers_find_better_places_where_the_order_of_tasks_stays():
    """They were placed for devices that are equally fast, so one of them waits for the slow one."""
    pipelined = jaxptis.pipeline(
        loss_fn, num_microbatches=8, devices=jax.devices()[:NUM_DEVICES], strategy="1f1b"
    )
    pipelined.lower(make_params(6), make_batch())
    pipeline = pipelined.shown.pipeline
    profile = as_if_slow(pipeline, 3)
    adapted, adaptation = adapt(pipeline, pipeline.analysis.costs, profile)
    assert adapted.plan == pipeline.plan
    assert adaptation.before_s == pytest.approx(profile.timeline.step_s)
    assert adaptation.after_s < 0.95 * adaptation.before_s


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
