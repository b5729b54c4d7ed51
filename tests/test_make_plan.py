"""From layers, costs and a strategy to a plan; nothing is traced or compiled."""

from pathlib import Path

import pytest

from jaxptis.make_plan import make_plan
from jaxptis.performance import Costs, LayerCost, simulate
from jaxptis.plan import schedule_to_csv
from jaxptis.schedules import FAMILIES, placement, schedule
from tests.clusters import equal_devices

LAYERS = tuple(f"layer{index}" for index in range(12))
COSTS = Costs(
    tuple(
        LayerCost(name=n, forward_s=1.0, backward_s=2.0, input_grad_s=1.0, weight_grad_s=1.0)
        for n in LAYERS
    )
)


def _make(strategy, num_layers=12, num_devices=2, num_microbatches=4):
    costs = Costs(COSTS.layers[:num_layers])
    cluster = equal_devices(num_devices)
    return make_plan(costs, strategy, cluster=cluster, num_microbatches=num_microbatches)


@pytest.mark.parametrize("strategy", ["adapits", "adaptis(v=2)", "mits"])
def test_a_slip_in_the_name_of_a_planner(strategy):
    with pytest.raises(ValueError, match=r"did you mean '(adaptis|mist)'"):
        _make(strategy)


@pytest.mark.parametrize("strategy", [*FAMILIES, "interleaved(v=3)", "list(stages_per_device=2)"])
def test_every_strategy_makes_a_plan(strategy):
    plan = _make(strategy)
    assert plan.layers == LAYERS
    assert tuple(stage.device for stage in plan.stages) == placement(strategy, num_devices=2)
    per_stage = len(LAYERS) // plan.num_stages
    assert {len(stage.layers) for stage in plan.stages} == {per_stage}
    assert (plan.num_devices, plan.num_microbatches) == (2, 4)
    assert simulate(plan, COSTS).step_s >= 12 / 2 * 3 * 4  # the work of a device


@pytest.mark.parametrize("name", FAMILIES)
def test_a_uniform_partition_reads_no_costs(name):
    costs = [LayerCost(**vars(COSTS.layers[0]) | {"name": n}) for n in LAYERS]
    costs[3] = LayerCost(**vars(costs[3]) | {"forward_s": 50.0})
    given = {"cluster": equal_devices(2), "num_microbatches": 4}
    uniform, balanced = (
        make_plan(Costs(tuple(costs)), f"{name}{option}", **given)
        for option in ("(partition=uniform)", "")
    )
    assert {len(stage.layers) for stage in uniform.stages} == {12 // uniform.num_stages}
    assert {len(stage.layers) for stage in balanced.stages} != {12 // uniform.num_stages}


def test_a_list_schedule_reads_the_costs():
    fixed, listed = (
        simulate(_make(strategy, num_devices=4), COSTS) for strategy in ("1f1b", "list")
    )
    assert listed.step_s < fixed.step_s


def test_too_few_layers_name_the_option():
    with pytest.raises(ValueError, match=r"^7 layers cannot fill 8 stages.*lower v to 3 or less"):
        _make("interleaved(v=4)", num_layers=7)


@pytest.mark.parametrize("strategy", ["1f1b", "interleaved(v=2)"])
def test_a_csv_is_a_strategy(strategy, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(schedule_to_csv(schedule(strategy, num_devices=2, num_microbatches=4)))
    for given in path, str(path):
        assert _make(given) == _make(strategy)


def test_a_csv_that_does_not_fit(tmp_path):
    def refuse(text, message, **sizes):
        path = Path(tmp_path) / "mine.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            _make(str(path), **sizes)

    good = schedule_to_csv(schedule("interleaved(v=2)", num_devices=2, num_microbatches=4))
    refuse(good, r"mine.csv: 3 layers cannot fill its 4 stages; use a .* 3 stages", num_layers=3)
    refuse(good, "has 4 microbatches, but num_microbatches is 8", num_microbatches=8)
    refuse(good, "needs 2 devices, but 1 are given", num_devices=1)
    refuse(good.replace("3B0,", ""), "mine.csv: the backward of microbatch 0 in stage 3 is missing")
    refuse("0F0,1F0\n1B0,0B0\n", "mine.csv: stage 1 has tasks on devices 0 and 1, 1B0 among them")
    refuse("0F0,2F0\n", "mine.csv: the schedule has no task of stage 1, but of stage 2")
    refuse("0F0,O1\n", "mine.csv: row 1, cell 2: bad task: found 'O1'")


def test_a_csv_that_is_not_there():
    with pytest.raises(ValueError, match=r"strategy 'gone\.csv' cannot be read"):
        _make("gone.csv")


def test_a_csv_of_a_spreadsheet(tmp_path):
    """Some begin with a mark of their encoding; some are not in UTF-8."""
    path = tmp_path / "mine.csv"
    text = schedule_to_csv(schedule("1f1b", num_devices=2, num_microbatches=4))
    path.write_text(text, encoding="utf-8-sig")
    assert len(_make(str(path)).stages) == 2
    path.write_text(f"\N{LATIN SMALL LETTER E WITH ACUTE}{text}", encoding="latin-1")
    with pytest.raises(ValueError, match=r"mine\.csv' cannot be read .*; give .* in UTF-8"):
        _make(str(path))
