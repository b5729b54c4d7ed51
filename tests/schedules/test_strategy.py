import re

import pytest

from jaxptis.schedules import (
    FAMILIES,
    StageCosts,
    check_fills_stages,
    partition,
    placement,
    schedule,
)


def _refuse(strategy: str, message: str, P: int = 2, M: int = 4) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        schedule(strategy, num_devices=P, num_microbatches=M)


def test_options_are_read() -> None:
    assert placement("interleaved(v=3)", num_devices=2) == (0, 1, 0, 1, 0, 1)
    assert placement(" interleaved ( v = 3 , ) ", num_devices=2) == (0, 1, 0, 1, 0, 1)
    assert placement("interleaved()", num_devices=2) == (0, 1, 0, 1)
    assert placement("hanayo(waves=2)", num_devices=2) == (0, 1, 1, 0, 0, 1, 1, 0)
    made = [
        schedule(strategy, num_devices=2, num_microbatches=4)
        for strategy in ("interleaved", "interleaved(group_size=2, v=2)", "interleaved(v=3)")
    ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_partition(name: str) -> None:
    assert partition(name) == partition(f"{name}(partition=balanced)") == "balanced"
    assert partition(f"{name}( partition = uniform )") == "uniform"
    assert partition("interleaved(partition=uniform, v=3)") == "uniform"
    assert placement("interleaved(partition=uniform, v=3)", num_devices=2) == (0, 1, 0, 1, 0, 1)


def test_unknown_names() -> None:
    known = ", ".join(map(repr, FAMILIES))
    _refuse("zigzag", f"schedule 'zigzag' is not known; use one of {known}")
    _refuse("1fb1", "schedule '1fb1' is not known; did you mean '1f1b'? use one of 'gpipe'")
    _refuse("", "schedule '' is not known; use one of")


def test_bad_options() -> None:
    where = "of schedule 'interleaved'"
    _refuse(
        "interleaved(groups=2)",
        f"option 'groups' {where} is not known; did you mean 'group_size'? use one of 'v', 'gr",
    )
    _refuse("gpipe(v=2)", "option 'v' of schedule 'gpipe' is not known; use one of 'partition'")
    _refuse(
        "gpipe(partition=even)",
        "option 'partition' of schedule 'gpipe' is 'even'; use one of 'balanced', 'uniform'",
    )
    _refuse("1f1b(partition=uniform, partition=uniform)", "option 'partition' of schedule '1f1b' s")
    _refuse("interleaved(v=two)", f"option 'v' {where} is 'two'; write a whole number")
    _refuse("interleaved(v=1.5)", f"option 'v' {where} is '1.5'; write a whole number")
    _refuse("interleaved(v)", f"option 'v' {where} is ''; write a whole number")
    _refuse("interleaved(v=0)", f"option 'v' {where} is 0; use 1 or more")
    _refuse("hanayo(waves=-1)", "option 'waves' of schedule 'hanayo' is -1; use 1 or more")
    _refuse("interleaved(v=2, v=2)", f"option 'v' {where} stands twice; remove one")
    _refuse("interleaved(v=2", "strategy 'interleaved(v=2' is not written as a name")
    _refuse("interleaved v=2", "strategy 'interleaved v=2' is not written as a name")


@pytest.mark.parametrize("strategy", FAMILIES)
@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(0, 2), (2, 0), (-1, 2)])
def test_numbers_below_one(strategy: str, num_devices: int, num_microbatches: int) -> None:
    with pytest.raises(ValueError, match=r"num_(devices|microbatches) is (0|-1); use 1 or more"):
        schedule(strategy, num_devices=num_devices, num_microbatches=num_microbatches)


def test_groups_that_do_not_fit() -> None:
    """Of 10 on 4 devices: 5 and 5; 6 and 4; or all. Not 4, 4 and 2, nor 7 and 3."""
    _refuse(
        "interleaved(group_size=4)",
        "group_size 4 of 'interleaved' does not fit 10 microbatches on 4 devices: every group "
        "needs 4 microbatches, the last 4 or more; use 5 or 6",
        P=4,
        M=10,
    )
    _refuse("interleaved(group_size=7)", "group_size 7 of 'interleaved' does not fit 10", P=4, M=10)
    for group_size in 5, 6, 10:
        schedule(f"interleaved(group_size={group_size})", num_devices=4, num_microbatches=10)


def test_too_few_microbatches_for_dualpipe() -> None:
    _refuse(
        "dualpipe-v",
        "7 microbatches are too few for 'dualpipe-v' on 4 devices; "
        "raise num_microbatches to 8 or more, or pass fewer devices",
        P=4,
        M=7,
    )


def test_costs_of_a_list_schedule() -> None:
    _refuse("list", "strategy 'list' orders tasks by their costs; pass costs")
    with pytest.raises(ValueError, match="the costs are of 3 stages, but the placement has 4; "):
        schedule(
            "list(stages_per_device=2)",
            num_devices=2,
            num_microbatches=4,
            costs=StageCosts.even(3),
        )


@pytest.mark.parametrize(
    ("strategy", "num_layers", "change"),
    [
        ("1f1b", 3, "pass 3 devices or fewer"),
        ("zb-v", 7, "pass 3 devices or fewer"),
        ("zb-v", 1, "use a strategy of fewer stages"),
        ("zb-v", 2, "pass 1 device"),
        ("interleaved(v=3)", 9, "lower v to 2 or less or pass 3 devices or fewer"),
        ("interleaved(v=3)", 2, "use a strategy of fewer stages"),
        ("hanayo(waves=2)", 9, "lower waves to 1 or pass 2 devices or fewer"),
        ("list(stages_per_device=9)", 8, "lower stages_per_device to 2 or less"),
    ],
)
def test_too_few_layers(strategy: str, num_layers: int, change: str) -> None:
    num_stages = len(placement(strategy, num_devices=4))
    message = (
        f"{num_layers} layers cannot fill {num_stages} stages, {num_stages // 4} on each device, "
        f"of {strategy!r}; {change} ("
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_fills_stages(strategy, num_devices=4, num_layers=num_layers)
    check_fills_stages(strategy, num_devices=4, num_layers=num_stages)
