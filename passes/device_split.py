"""The IR of a jaxpr cut over devices: programs of one device each, and the arrays between them."""

import dataclasses

from passes import jaxprs
from passes.jaxprs import Jaxpr


@dataclasses.dataclass(frozen=True)
class Place:
    """The name of an input or output, and the devices that hold a copy, the owner first."""

    name: str
    homes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProgram:
    """What one device computes in one phase.

    Attributes:
      device: where it runs.
      jaxpr: what it runs.
      inputs: names of the arrays of this device that it reads.
      outputs: names that its results get on this device.
    """

    device: int
    jaxpr: Jaxpr
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True, order=True, kw_only=True)
class Move:
    """One array that crosses; it has the same name on both devices."""

    source: int
    target: int
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Programs of different devices, which do not wait for each other; after them, the moves."""

    programs: tuple[DeviceProgram, ...]
    moves: tuple[Move, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSplit:
    """A jaxpr cut over devices.

    To run it, give each device a table of arrays by name. Put input i, as `inputs[i].name`, in the
    tables of `inputs[i].homes`. Phase after phase, run the programs, each on the table of its
    device, then copy what moves from table to table. Output k is then `outputs[k].name` in the
    tables of `outputs[k].homes`. Within a table a name is bound once. An input without a home is
    not read. Two outputs may have one name, and an output the name of an input.
    """

    phases: tuple[Phase, ...]
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise unless each device has what its programs read, and in the end its outputs."""
        held = {(device, place.name) for place in self.inputs for device in place.homes}
        for phase in self.phases:
            devices = [program.device for program in phase.programs]
            assert len(devices) == len(set(devices)), f"two programs on a device: {devices}"
            for program in phase.programs:
                _check_program(program, held)
                _bind(held, [(program.device, name) for name in program.outputs])
            for move in phase.moves:
                assert (move.source, move.name) in held, f"{move} has nothing to send"
            _bind(held, [(move.target, move.name) for move in phase.moves])
        for place in self.outputs:
            assert place.homes, f"{place.name} has no home"
            assert all((device, place.name) in held for device in place.homes), place

    def text(self) -> str:
        """Return the places, programs and moves, a line each."""
        lines = [f"input {i}: {_place_text(place)}" for i, place in enumerate(self.inputs)]
        for index, phase in enumerate(self.phases):
            lines += ["", f"phase {index}"]
            lines += [f"  device {_program_text(program)}" for program in phase.programs]
            lines += [f"  {move.source} -> {move.target}: {move.name}" for move in phase.moves]
        lines += ["", *(f"output {k}: {_place_text(p)}" for k, p in enumerate(self.outputs))]
        return "\n".join([*lines, ""])


def _check_program(program: DeviceProgram, held: set[tuple[int, str]]) -> None:
    """Raise unless `program` is well-typed and its device holds what it reads."""
    missing = [name for name in program.inputs if (program.device, name) not in held]
    assert not missing, f"device {program.device} does not hold {missing}"
    assert len(program.inputs) == len(program.jaxpr.invars)
    assert len(program.outputs) == len(program.jaxpr.outvars)
    jaxprs.check(program.jaxpr)


def _bind(held: set[tuple[int, str]], names: list[tuple[int, str]]) -> None:
    """Add `names` to `held`, where they must be new."""
    twice = held.intersection(names)
    assert not twice and len(set(names)) == len(names), f"bound twice: {twice or names}"
    held.update(names)


def _place_text(place: Place) -> str:
    return f"{place.name} on {', '.join(map(str, place.homes)) or 'no device'}"


def _program_text(program: DeviceProgram) -> str:
    size = f"{len(program.jaxpr.eqns)} equations"
    return f"{program.device}: {' '.join(program.inputs)} -> {' '.join(program.outputs)} ({size})"
