"""Pipelines over several processes: the results of one, and the end of all when one fails."""

import functools
import json
import subprocess
import sys
import time

import jax
import pytest

from experiments.launch import free_port
from jaxptis import processes
from tests.process_program import FAILING, NUM_DEVICES, NUM_STEPS, run


@functools.cache
def in_one_process(strategy):
    with jax.numpy_dtype_promotion("standard"):
        return run(jax.devices()[:NUM_DEVICES], strategy)


@pytest.mark.parametrize(
    ("count", "strategy", "embeddings"),
    # The embedding is in the first and the last stage.
    [(4, "1f1b", 2), (2, "1f1b", 2), (4, "zb-v", 1), (4, "random", 2), (4, "gap", 2)],
)
def test_results_are_those_of_one_process(count, strategy, embeddings, tmp_path):
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.launch", f"--num_processes={count}"),
            *(f"--devices_per_process={NUM_DEVICES // count}", "--"),
            *("tests.process_program", f"--results_to={tmp_path}", f"--strategy={strategy}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    read = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(count)]
    union = {}
    for each in read:
        assert {name for name in each if name.startswith(("step", "evaluation"))} == {
            *(f"step {i}['{what}']" for i in range(NUM_STEPS) for what in ("aux']['worst", "loss")),
            *("evaluation['aux']['worst']", "evaluation['loss']"),
        }
        assert each.items() <= in_one_process(strategy).items()
        union |= each
    assert union == in_one_process(strategy)
    for name, holders in ("['embedding']", embeddings), ("['blocks'][3]['up']", 1):
        assert sum(f"state.params{name}" in each for each in read) == holders
        assert [each.get(f"initial{name}", "0") for each in read].count("1") == holders
        assert sum(f"gradient[1]{name}" in each for each in read) == 1


@pytest.mark.parametrize(
    ("count", "failure", "complaint"),
    [
        (4, "killed", f"process {FAILING} has shown no sign of life"),
        (2, "raises", f"process {FAILING} failed: ValueError: the batch is spoilt"),
        (
            2,
            "differs",
            f"the layers and microbatches of process 0 and of process {FAILING} differ",
        ),
    ],
)
def test_a_failure_ends_all_and_is_named(count, failure, complaint, tmp_path):
    """Without the launcher, which would see it, too."""
    address = f"127.0.0.1:{free_port()}"
    size = NUM_DEVICES // count
    children = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.process_program", f"--results_to={tmp_path}"),
                *(f"--failure={failure}", f"--coordinator_address={address}"),
                *(f"--process_count={count}", f"--process_index={i}"),
                f"--local_device_ids={','.join(str(size * i + k) for k in range(size))}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    failing = children[FAILING]
    failing.wait(timeout=300)
    start_s = time.monotonic()
    shown = [child.communicate(timeout=300)[1] for child in children]
    assert time.monotonic() - start_s < 60
    assert all(child.returncode != 0 for child in children if child.args != failing.args)
    assert failing.returncode != 0 or failure == "leaves"
    for index, text in enumerate(shown):
        if failure not in ("killed", "leaves") or index != FAILING:
            assert complaint in text
    assert not list(tmp_path.iterdir())


class Clock:
    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(processes.time, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_who_is_silent_is_lost_unless_it_left(clock):
    judge = processes.Judge(3)
    assert judge.verdict({0: "1", 1: "1"}, {}, {}, {}) is None  # process 2 has not begun
    clock.now_s += processes.LOST_S - 1
    assert judge.verdict({0: "2", 1: "1", 2: "left"}, {}, {}, {}) is None
    clock.now_s += 2
    found = judge.verdict({0: "3", 1: "1", 2: "left"}, {}, {}, {})
    assert found is not None and found.startswith("process 1 has shown no sign of life")


def test_the_first_error_is_told_at_once(clock):
    judge = processes.Judge(3)
    beats = {0: "1", 1: "1", 2: "1"}
    assert judge.verdict(beats, {}, {2: "process 2 failed", 10: "process 1 failed"}, {}) == (
        "process 2 failed"
    )


def test_an_error_that_another_may_have_caused_waits_for_it(clock):
    judge = processes.Judge(3)
    felt = {1: "process 2 failed"}
    for beat in range(round(processes.LOST_S)):
        clock.now_s += 1
        assert judge.verdict({0: str(beat), 1: "1", 2: str(beat)}, {}, {}, felt) is None
    clock.now_s += 2
    beats = {0: "last", 1: "1", 2: "last"}
    assert "process 1 has shown" in str(judge.verdict(beats, {}, {}, felt))


def test_an_error_that_nobody_caused_is_told_in_the_end(clock):
    judge = processes.Judge(2)
    felt = {1: "process 1 failed"}
    for beat in range(round(processes.LOST_S) + 2):
        assert judge.verdict({0: str(beat), 1: str(beat)}, {}, {}, felt) is None
        clock.now_s += 1
    clock.now_s += 2
    assert judge.verdict({0: "last", 1: "last"}, {}, {}, felt) == "process 1 failed"
    assert processes.Judge(1).verdict({0: "1"}, {}, {}, felt) == "process 1 failed"  # all have


def test_calls_are_compared(clock):
    first, second = processes.Calls(), processes.Calls()
    judge = processes.Judge(2)

    def verdict(beat):
        texts = {0: first.text(), 1: second.text()}
        return judge.verdict({0: "1", 1: beat}, texts, {}, {})

    for _ in range(2 * processes.REMEMBERED):
        first.append("a training step")
        second.append("a training step")
    assert verdict("1") is verdict(processes.LEFT) is None
    for _ in range(processes.REMEMBERED - 1):
        first.append("an evaluation")
        assert verdict("1") is None  # the other may yet come
        assert "1 has ended, but process 0 has come to an eval" in verdict(processes.LEFT)
    second.append("a gradient")
    assert "0 has come to an evaluation, process 1 to a gradient" in verdict("1")


def test_every_process_must_have_a_device():
    class Device:
        process_index = 1

    with pytest.raises(ValueError, match="devices of process 1, but none of 0"):
        processes.Processes([Device()])
