"""Launches small programs that need no jax; `tests/test_processes.py` launches an experiment."""

import os
import signal
import subprocess
import sys
import time

import pytest

# Each is told the process it is by --process_index. Those that wait would do so for a minute.
INDEX = "import os, signal, sys, time; index = sys.argv[-2].removeprefix('--process_index=')\n"
WAIT = INDEX + "print('waiting', os.getpid()); time.sleep(60)"
PROGRAMS = {
    "show": "import sys; print(*sys.argv[1:]); print('to stderr', file=sys.stderr)",
    "fail": INDEX + "if index == '1': raise ValueError('too small')\ntime.sleep(60)",
    "killed": INDEX + "if index == '2': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)",
    "cores": "import os; print(sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0))",
    "wait": WAIT,
    "stubborn": INDEX + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT,
}


@pytest.fixture
def launch(tmp_path):
    for name, source in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), *sys.path])

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.launch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    return start


def test_each_process_has_its_flags_and_its_prefix(launch):
    run = launch("--num_processes=3", "--devices_per_process=2", "--", "show", "--size=tiny")
    out, err = run.communicate(timeout=50)
    assert run.returncode == 0, err
    shown = [line for line in out.splitlines() if "--size" in line]
    address = shown[0].split("--coordinator_address=")[1].split()[0]
    assert sorted(shown) == [
        f"[{i}] --size=tiny --coordinator_address={address} --process_count=3 "
        f"--process_index={i} --local_device_ids={2 * i},{2 * i + 1}"
        for i in range(3)
    ]
    assert {f"[{i}] to stderr" for i in range(3)} <= set(out.splitlines())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_each_process_has_a_core_of_its_own(launch):
    run = launch("--num_processes=2", "--pin", "--", "cores")
    out, err = run.communicate(timeout=50)
    assert run.returncode == 0, err
    first, second, *_ = sorted(os.sched_getaffinity(0))
    assert sorted(out.splitlines()) == [
        f"[{index}] [{core}] {os.SCHED_BATCH}" for index, core in enumerate((first, second))
    ]


def test_more_processes_than_cores_are_not_pinned(launch):
    run = launch("--num_processes=9999", "--pin", "--", "cores")
    _, err = run.communicate(timeout=50)
    assert run.returncode == 1
    assert "--pin: 9999 processes, but" in err and "start fewer, or drop --pin" in err


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("fail", "process 1 failed with exit status 1"),
        ("killed", "process 2 was ended by SIGKILL"),
    ],
)
def test_a_failure_stops_the_others_and_is_named(launch, program, complaint):
    start_s = time.monotonic()
    run = launch("--num_processes=3", "--", program)
    out, err = run.communicate(timeout=50)
    assert time.monotonic() - start_s < 30  # the others would take 60
    assert run.returncode == 1
    assert complaint in err
    if program == "fail":
        assert "[1] ValueError: too small" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_all(launch, number):
    run = launch("--num_processes=2", "--", "wait")
    pids = [int(run.stdout.readline().split()[-1]) for _ in range(2)]
    run.send_signal(number)
    _, err = run.communicate(timeout=50)
    check_interrupted(run, err, pids)


def test_a_second_interrupt_changes_nothing(launch):
    """Schedulers send one to a process, and one to all of its group."""
    run = launch("--num_processes=2", "--", "stubborn")
    pids = [int(run.stdout.readline().split()[-1]) for _ in range(2)]
    run.send_signal(signal.SIGTERM)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=50)
    check_interrupted(run, err, pids)


def check_interrupted(run, err, pids):
    assert run.returncode == 1
    assert "interrupted" in err and "Traceback" not in err
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nothing_to_run_is_refused(launch):
    run = launch("--num_processes=2")
    out, err = run.communicate(timeout=50)
    assert run.returncode != 0
    assert "name an experiment" in out + err
