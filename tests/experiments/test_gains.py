import json
import math
from dataclasses import replace

import jax
import pytest

from experiments.gain import Gain, Step, conclusion, means
from experiments.model_layers import loss_of
from experiments.uneven_models import HEADS, uneven_config
from models import MODELS
from tests.experiments.program import assert_refused, run_program


def step(predicted_s, measured_s):
    return Step(strategy="any", num_stages=2, predicted_s=predicted_s, measured_s=measured_s)


GAIN = Gain(
    model="llama2",
    num_devices=2,
    num_microbatches=4,
    interleaved=step(3.0, 4.0),
    best=step(2.0, 2.0),
)


def gains(*arguments):
    return run_program("gains", "--models=llama2", *arguments)


def test_a_gain_is_how_many_times_as_long_the_other_step_takes():
    assert (GAIN.predicted, GAIN.measured, GAIN.ratio) == (1.5, 2.0, 0.75)


def test_means_are_geometric_and_errors_count_on_both_sides():
    slower = replace(GAIN, interleaved=step(1.0, 1.0), best=step(1.0, 2.0))
    of = means([GAIN, slower])
    assert of["measured"] == pytest.approx(1.0)  # 2 and 1/2
    assert of["predicted"] == pytest.approx(math.sqrt(1.5))
    assert of["least_measured"] == 0.5
    assert of["worst_error"] == 1.0  # 1 over 1/2; the other is off by a quarter
    assert "1.000 measured, 1.225 predicted (the paper: 1.42" in conclusion([GAIN, slower])


@pytest.mark.parametrize("name", HEADS)
def test_a_small_head_has_the_share_of_a_published_one(name):
    published, vocab_size = HEADS[name]
    small = uneven_config(name)
    assert small == replace(MODELS[name].sizes["small"], vocab_size=vocab_size)
    # A tenth, since vocabularies are powers of 2.
    assert head_share(name, small) == pytest.approx(
        head_share(name, MODELS[name].sizes[published]), rel=0.1
    )


def head_share(name, config):
    """Return the head's share of the numbers that a token is multiplied by, lookups not counted."""
    _, params, _ = loss_of(MODELS[name], config, batch_size=1, sequence_length=256)
    head = others = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        of, size = jax.tree_util.keystr(path), math.prod(leaf.shape)
        if "head" in of or ("embed" in of and name == "gemma"):  # its embedding is the head, too
            head += size * (2 if getattr(config, "after_next", False) else 1)  # for two tokens
        elif "routed" in of:
            others += size * config.experts_per_token // config.num_experts
        elif "embed" not in of:
            others += size
    return head / (head + others)


def test_steps_that_sleep(tmp_path):
    path = tmp_path / "gains.json"
    run = gains("--num_devices=4", "--asleep", "--num_steps=1", f"--json_output={path}")
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["num_devices"], row["num_microbatches"]) == (4, 8)
    assert row["interleaved"]["strategy"].startswith("interleaved(v=")
    assert row["interleaved"]["num_stages"] % 4 == 0
    assert row["best"]["strategy"] == "best"
    for name in "predicted", "measured":
        interleaved_s, best_s = (row[which][f"{name}_s"] for which in ("interleaved", "best"))
        assert row[name] == interleaved_s / best_s > 0
    assert "these are times of no model" in run.stdout
    assert "best over interleaved 1F1B, geometric mean" in run.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=llama", "give names of families: deepseek"),
        ("--num_devices=4,x", "give whole numbers of 2 or more"),
        ("--slower=2", "--slower is for --asleep"),
        ("--json_output=no/such/folder/x.json", "its folder does not exist"),
    ],
)
def test_flags_that_are_wrong(flag, message):
    assert_refused(gains(flag), message)
