"""A step as it was run: all of its tasks, when they were, and the same result as without a look."""

import jax
import numpy as np
import optax
import pytest

import jaxptis
from tests.small_models import loss_fn, make_batch, make_params

pytestmark = pytest.mark.usefixtures("lenient")

NUM_STEPS = 2


def make_step(strategy):
    pipelined = jaxptis.pipeline(
        loss_fn, num_microbatches=4, devices=jax.devices()[:2], strategy=strategy
    )
    step = pipelined.train_step(optax.adam(1e-2))
    return pipelined, step, step.init(make_params(4), make_batch())


@pytest.mark.parametrize("strategy", ["1f1b", "zb-v"])
def test_a_profile_has_the_tasks_of_the_plan_and_changes_no_result(strategy, tmp_path):
    pipelined, step, state = make_step(strategy)
    _, other, expected = make_step(strategy)
    state, profile = step.profile(state, make_batch(), NUM_STEPS)
    for _ in range(1 + 2 * NUM_STEPS):
        expected, _ = other(expected, make_batch())
    assert state.step == expected.step
    for got, want in zip(
        jax.tree.leaves(jaxptis.whole(state.params)),
        jax.tree.leaves(jaxptis.whole(expected.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)

    plan, timeline = pipelined.plan, profile.timeline
    # The first stage has no input gradient: its I is empty, and not run.
    wanted = [[t for t in row if (t.stage, t.kind) != (0, "I")] for row in plan.schedule]
    assert [[span.task for span in row] for row in timeline.spans] == wanted
    at = {span.task: span for row in timeline.spans for span in row}
    assert min(span.start_s for span in at.values()) == 0
    for row in timeline.spans:
        times = [time for span in row for time in (span.start_s, span.end_s)]
        assert times == sorted(times)
    for each in timeline.transfers:
        assert at[each.made_by].end_s <= each.start_s <= each.end_s
        assert each.num_bytes > 0
    for curve, accounted in zip(timeline.memory, pipelined.memory, strict=True):
        assert curve.peak_bytes == accounted.peak_bytes
        assert curve.peak_parts["temporaries"] == accounted.temporary_bytes
        assert sum(curve.peak_parts.values()) == curve.peak_bytes
        assert curve.times_s[-1] <= timeline.step_s
        # Adam's two moments, and a sum for each parameter.
        parts = curve.peak_parts
        assert parts["optimizer state"] == pytest.approx(2 * parts["parameters"], abs=8)
        assert parts["gradients"] == parts["parameters"]
    for suffix in "html", "json", "txt":
        pipelined.timeline.save(tmp_path / f"step.{suffix}", measured=timeline, plan=plan)
    assert '"optimizer state"' in (tmp_path / "step.html").read_text()
    assert timeline.step_s <= max(profile.recorded_s)
    assert len(profile.recorded_s) == len(profile.plain_s) == NUM_STEPS
    assert f"{profile.cost:+.1%}" in str(profile)
    assert profile.clock_error_s == 0


def test_a_profile_of_no_step_is_refused():
    _, step, state = make_step("1f1b")
    with pytest.raises(ValueError, match="num_steps is 0; record 1 or more"):
        step.profile(state, make_batch(), 0)
