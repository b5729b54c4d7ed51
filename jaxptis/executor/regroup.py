"""Transfers of a new order by the programs of an old one.

What crosses together depends on the order of the tasks, but what crosses does not: so transfers
whose program was never compiled are taken apart into some that were.
"""

from collections.abc import Callable, Sequence

from jaxptis.executor.instructions import Instruction, Rows, Transfer
from jaxptis.executor.programs import Aval
from jaxptis.executor.transfer import Route

_Ends = tuple[tuple[str, ...], tuple[str, ...]]  # what either of two devices sends


def regroup(rows: Rows, routes: Sequence[Route], type_of: Callable[[int, str], Aval]) -> Rows:
    """Return the lists with transfers of these routes only.

    Args:
        rows: the lists, without frees.
        routes: of which there are programs.
        type_of: the type of a buffer, by device and name.

    Raises:
        ValueError: none of the routes sends only what is left of a transfer.
    """

    def parts(device: int, instruction: Instruction) -> Sequence[Instruction]:
        if not isinstance(instruction, Transfer):
            return [instruction]
        peer, ends = instruction.peer, (instruction.sends, instruction.receives)
        if device < peer:
            found = _apart((device, peer), ends, routes, type_of)
        else:  # both devices look from the first of them, and so find the same
            found = [both[::-1] for both in _apart((peer, device), ends[::-1], routes, type_of)]
        return [Transfer(peer=peer, sends=sends, receives=receives) for sends, receives in found]

    regrouped = Rows(len(rows.rows))
    regrouped.rows = [
        [part for each in row for part in parts(device, each)]
        for device, row in enumerate(rows.rows)
    ]
    return regrouped


def _apart(
    devices: tuple[int, int],
    left: _Ends,
    routes: Sequence[Route],
    type_of: Callable[[int, str], Aval],
) -> list[_Ends]:
    """Take what crosses apart, each time by the route that takes most of what is left."""
    found: list[_Ends] = []
    while any(left):
        types = [
            [(name, type_of(device, name)) for name in names]
            for device, names in zip(devices, left, strict=True)
        ]
        fitting = [
            (first, second)
            for route in routes
            if route.devices == devices
            and (first := _taken(types[0], route.sends[0])) is not None
            and (second := _taken(types[1], route.sends[1])) is not None
        ]
        if not fitting:
            raise ValueError(
                f"devices {devices[0]} and {devices[1]} have no program that sends only "
                f"{' and '.join(left[0] + left[1])}, which this order needs"
            )
        first, second = max(fitting, key=lambda both: len(both[0]) + len(both[1]))
        found.append((first, second))
        left = _without(left[0], first), _without(left[1], second)
    return found


def _taken(names: Sequence[tuple[str, Aval]], types: Sequence[Aval]) -> tuple[str, ...] | None:
    """Return the first names of these types, or None if there are too few."""
    left, found = list(names), []
    for wanted in types:
        name = next((name for name, aval in left if aval == wanted), None)
        if name is None:
            return None
        left = [each for each in left if each[0] != name]
        found.append(name)
    return tuple(found)


def _without(names: Sequence[str], gone: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in gone)
