"""Schedules to and from torch.distributed.pipelining itself, on CPU."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxptis.plan import Plan, StagePlan, schedule_from_csv, schedule_to_csv
from jaxptis.plan.csv import placement_of
from jaxptis.schedules import FAMILIES, StageCosts, placement, schedule

P = 2
WORKER = Path(__file__).parent / "torch_worker.py"


@pytest.fixture(scope="module")
def schedules():
    pytest.importorskip("torch", reason="needs the extra 'torch'")
    from torch.distributed.pipelining import schedules

    return schedules


def test_torch_runs_our_schedules(schedules, tmp_path):
    """Every family, and its loss and gradients are those of the model without a pipeline."""
    strategies = [*FAMILIES, "interleaved(v=3)", "hanayo(waves=2)", "list(stages_per_device=2)"]
    for strategy in strategies:
        costs = StageCosts.even(len(placement(strategy, num_devices=P)))
        rows = schedule(strategy, num_devices=P, num_microbatches=4, costs=costs)
        (tmp_path / f"{strategy}.csv").write_text(schedule_to_csv(rows))
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(P), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(P)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        equal = [line.partition(": ")[0] for line in output.splitlines() if "equal" in line]
        assert sorted(equal) == sorted(strategies)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("ScheduleInterleaved1F1B", "interleaved(v=2)"),
        ("ScheduleInterleaved1F1B", "interleaved(v=3)"),
        ("ScheduleInterleavedZeroBubble", "zb-h1"),
        ("ScheduleInterleavedZeroBubble", None),
        ("ScheduleLoopedBFS", None),
        ("ScheduleZBVZeroBubble", "zb-v"),
        ("ScheduleDualPipeV", "dualpipe-v"),
    ],
)
@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(2, 4), (4, 8), (4, 10)])
def test_schedules_of_torch_are_read(
    schedules, tmp_path, name, strategy, num_devices, num_microbatches
):
    """A plan with all tasks comes of each; ours, where it is a family of ours."""
    devices = placement(strategy or "interleaved(v=2)", num_devices=num_devices)
    stages = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=len(devices),
            group_size=num_devices,
            group_rank=0,
            submod=schedules.torch.nn.Identity(),
            is_first=stage == 0,
            is_last=stage == len(devices) - 1,
        )
        for stage, device in enumerate(devices)
        if device == 0
    ]
    theirs = getattr(schedules, name)(stages, num_microbatches, loss_fn=lambda *_: None)
    path = tmp_path / "theirs.csv"
    theirs._dump_csv(str(path), format="compute_only")
    rows = schedule_from_csv(path.read_text(), source=str(path))
    plan = Plan(
        stages=tuple(
            StagePlan(layers=(f"layer{stage}",), device=device)
            for stage, device in enumerate(placement_of(rows))
        ),
        schedule=rows,
    )
    assert tuple(stage.device for stage in plan.stages) == devices
    assert plan.num_microbatches == num_microbatches
    if strategy is not None:
        ours = schedule(strategy, num_devices=num_devices, num_microbatches=num_microbatches)
        assert rows == ours
