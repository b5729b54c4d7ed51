"""The flag for a file of results, and what such a file says of the run that made it."""

import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

JSON_OUTPUT = flags.DEFINE_string("json_output", None, "File for the settings and the results.")


@flags.validator("json_output", "its folder does not exist; create it first")
def has_folder(path: str | None) -> bool:
    """Whether a file can be written at this path, if there is one."""
    return path is None or pathlib.Path(path).absolute().parent.is_dir()


def write_json(results: Any) -> None:
    """Writes results to --json_output, if it is given."""
    if JSON_OUTPUT.value is not None:
        pathlib.Path(JSON_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")


def this_run(program: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a program of this folder was called, on what, and its settings."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "num_processes": jax.process_count(),
        "num_cpus": os.cpu_count(),
        "cpus_of_a_process": _cpus_of_this_process(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")},
        "command": f"python -m experiments.{program} {shlex.join(sys.argv[1:])}",
        "settings": dict(settings),
    }


def _cpus_of_this_process() -> int | None:
    """Returns how many it may run on: all, where the system cannot tell, as on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
