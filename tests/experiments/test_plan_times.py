import json

import pytest

from experiments.published import published_costs
from tests.experiments.program import run_program


def test_time_memory_and_what_more_time_gives(tmp_path):
    path = tmp_path / "times.json"
    arguments = "--cases=2x2x12x1", "--longer_s=2", f"--json_output={path}"
    run = run_program("plan_times", *arguments)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(path.read_text())
    first, *inner, last = published_costs("nemotron-nano-v2-9B").layers
    work_s = sum(x.forward_s + x.backward_s for x in (first, *inner[:10], last))
    assert work_s / 2 * 2 < row["longer_step_ms"] / 1e3  # two devices, two microbatches
    assert row["over_longer"] == pytest.approx(row["step_ms"] / row["longer_step_ms"])
    assert row["took_s"] > 0 and row["memory_bytes"] > 10 * 2**20
