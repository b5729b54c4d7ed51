"""A strategy as a person writes it, such as `interleaved(v=3)`, and what it says."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from jaxptis.plan import Schedule
from jaxptis.schedules.families import FAMILIES, Family
from jaxptis.schedules.stage_costs import StageCosts

PARTITIONS = "balanced", "uniform"
"""How layers are cut into stages: by their costs, which is the default, or by their number."""


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    family: Family
    options: dict[str, int | None]
    partition: str

    def stages_per_device(self) -> int:
        return self.family.stages_per_device * (self.options.get(self.family.stages_option) or 1)


def names_family(strategy: str) -> bool:
    """Return whether a strategy begins with the name of a family, whatever its options.

    >>> names_family("interleaved(v=3)"), names_family("plans/mine.txt")
    (True, False)
    """
    return strategy.partition("(")[0].strip() in FAMILIES


def partition(strategy: str) -> str:
    """Return how its layers are cut into stages, one of `PARTITIONS`.

    >>> partition("1f1b"), partition("interleaved(v=3, partition=uniform)")
    ('balanced', 'uniform')

    Raises:
        ValueError: the strategy is not known or badly written.
    """
    return _parse(strategy).partition


def check_fills_stages(strategy: str, *, num_devices: int, num_layers: int) -> None:
    """Check that there is a layer for every stage.

    Raises:
        ValueError: there are too few layers, or the strategy is not known or badly written.
    """
    chosen = _parse(strategy)
    family, per_device = chosen.family, chosen.stages_per_device()
    if num_layers >= num_devices * per_device:
        return
    changes = []
    limit = num_layers // (num_devices * family.stages_per_device)
    if family.stages_option and limit:
        less = " or less" if limit > 1 else ""
        changes.append(f"lower {family.stages_option} to {limit}{less}")
    if num_layers >= per_device:
        most = num_layers // per_device
        changes.append(f"pass {most} devices or fewer" if most > 1 else "pass 1 device")
    raise ValueError(
        f"{num_layers} layers cannot fill {num_devices * per_device} stages, {per_device} on each "
        f"device, of {strategy!r}; {' or '.join(changes) or 'use a strategy of fewer stages'} "
        "(layers inside one scan, loop or checkpoint count as one)"
    )


def placement(strategy: str, *, num_devices: int) -> tuple[int, ...]:
    """Return the device of every stage.

    >>> placement("interleaved(v=2)", num_devices=2)
    (0, 1, 0, 1)
    >>> placement("zb-v", num_devices=2)
    (0, 1, 1, 0)

    Raises:
        ValueError: the strategy is not known or badly written, or `num_devices` is below 1.
    """
    chosen = _parse(strategy)
    _check_positive("num_devices", num_devices)
    return chosen.family.placement(num_devices, chosen.stages_per_device())


def schedule(
    strategy: str, *, num_devices: int, num_microbatches: int, costs: StageCosts | None = None
) -> Schedule:
    """Make the rows of all devices.

    >>> schedule("1f1b", num_devices=2, num_microbatches=1)[1]
    (Task(stage=1, kind='F', microbatch=0), Task(stage=1, kind='B', microbatch=0))

    Args:
        strategy: the name of a family, with options in brackets or without.
        num_devices: how many devices there are.
        num_microbatches: how many microbatches run through every stage.
        costs: the seconds of every stage; only "list" reads and needs them.

    Raises:
        ValueError: the strategy is not known or badly written, it does not allow these numbers, or
            costs are missing.
    """
    chosen = _parse(strategy)
    _check_positive("num_devices", num_devices)
    _check_positive("num_microbatches", num_microbatches)
    numbers = {
        "num_devices": num_devices,
        "num_microbatches": num_microbatches,
        **chosen.options,
    }
    if not chosen.family.needs_costs:
        return _rows(chosen.family.rows, tuple(numbers.items()))
    if costs is None:
        raise ValueError(f"strategy {strategy!r} orders tasks by their costs; pass costs")
    return chosen.family.rows(**numbers, costs=costs)


@lru_cache(maxsize=1)  # the check of a strategy and its plan ask for the same rows
def _rows(make: Callable[..., Schedule], numbers: tuple[tuple[str, int | None], ...]) -> Schedule:
    return make(**dict(numbers))


def _parse(strategy: str) -> _Chosen:
    match = re.fullmatch(r"\s*([^()\s]*)\s*(?:\((.*)\))?\s*", strategy)
    if match is None:
        raise ValueError(
            f"strategy {strategy!r} is not written as a name, or a name and options in brackets, "
            "such as 'interleaved(v=2)'"
        )
    name, text = match.groups()
    if name not in FAMILIES:
        raise ValueError(f"schedule {name!r} is not known; {_instead(name, FAMILIES)}")
    family = FAMILIES[name]
    options = dict(family.options)
    partition = PARTITIONS[0]
    given: set[str] = set()
    for part in (text or "").split(","):
        if not part.strip():
            continue
        option, _, value = (word.strip() for word in part.partition("="))
        if option not in (*family.options, "partition"):
            known = _instead(option, (*family.options, "partition"))
            raise ValueError(f"option {option!r} of schedule {name!r} is not known; {known}")
        if option in given:
            raise ValueError(f"option {option!r} of schedule {name!r} stands twice; remove one")
        given.add(option)
        if option == "partition":
            partition = value
            if partition not in PARTITIONS:
                raise ValueError(
                    f"option 'partition' of schedule {name!r} is {value!r}; "
                    f"{_instead(value, PARTITIONS)}"
                )
            continue
        if re.fullmatch(r"-?[0-9]{1,9}", value) is None:
            raise ValueError(
                f"option {option!r} of schedule {name!r} is {value!r}; write a whole number of at "
                f"most nine digits, such as {option}={family.options[option] or 8}"
            )
        _check_positive(f"option {option!r} of schedule {name!r}", int(value))
        options[option] = int(value)
    return _Chosen(family=family, options=options, partition=partition)


def _instead(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}use one of {', '.join(map(repr, known))}"


def _check_positive(what: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{what} is {number}; use 1 or more")
