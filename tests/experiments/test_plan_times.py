import json

import pytest

from experiments.published import published_costs
from tests.experiments.program import run_program


def test_time_memory_and_what_more_time_gives(tmp_path):
    path = tmp_path / "times.json"
    arguments = "--cases=2x8x12x1", "--longer_s=2", f"--json_output={path}"
    run = run_program("plan_times", *arguments)
    assert run.returncode == 0, run.stderr
    rows = json.loads(path.read_text())
    assert [row["blocking"] for row in rows] == [False, True]
    assert rows[0]["step_ms"] < rows[1]["step_ms"]  # of these layers they are not the same
    first, *inner, last = published_costs("nemotron-nano-v2-9B").layers
    work_s = sum(x.forward_s + x.backward_s for x in (first, *inner[:10], last))
    for row in rows:
        assert work_s / 2 * 8 < row["longer_step_ms"] / 1e3  # two devices, eight microbatches
        assert row["over_longer"] == pytest.approx(row["step_ms"] / row["longer_step_ms"])
        assert row["took_s"] > 0 and row["memory_bytes"] > 10 * 2**20
