"""From a jaxpr split by device to instructions."""

from collections.abc import Mapping, Sequence

from jaxptis.executor.instructions import Rows
from passes.device_split import DeviceSplit


def emit_split(
    rows: Rows, split: DeviceSplit, prefix: str, *, inputs: Sequence[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Write the phases of a split.

    Args:
      rows: where to write.
      split: the programs and moves.
      prefix: begins the names of its programs and buffers.
      inputs: the buffers that its inputs are.

    Returns:
      For each output its buffer, and the devices that hold it.
    """
    names: Mapping[str, str] = {
        place.name: buffer for place, buffer in zip(split.inputs, inputs, strict=True)
    }

    def named(name: str) -> str:
        return names.get(name, f"{prefix}.{name}")

    for index, phase in enumerate(split.phases):
        for program in phase.programs:
            rows.run(
                program.device,
                split_program_name(prefix, index, program.device),
                [named(n) for n in program.inputs],
                [named(n) for n in program.outputs],
            )
        for move in phase.moves:
            rows.transfer(move.source, move.target, named(move.name))
    return [(named(place.name), place.homes) for place in split.outputs]


def split_program_name(prefix: str, phase: int, device: int) -> str:
    """The program of a device in a phase of a split."""
    return f"{prefix}.phase{phase}.device{device}"
