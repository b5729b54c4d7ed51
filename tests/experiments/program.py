"""Programs of experiments, run as a user runs them."""

import os
import subprocess
import sys


def run_program(name, *arguments, launcher=(), **environment):
    """Run one to its end, by a launcher if there is one, and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", *launcher, f"experiments.{name}", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def assert_refused(run, *messages):
    """Check that a program ended with what is wrong with its input, and without a traceback."""
    assert run.returncode == 1
    for message in messages:
        assert message in run.stderr
    assert "Traceback" not in run.stderr
