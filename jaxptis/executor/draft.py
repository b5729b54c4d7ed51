"""A step while it is put together, and the copies of leaves that it works on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxptis.executor.compiled import Compiler
from jaxptis.executor.emit_split import emit_split, split_program_name
from jaxptis.executor.executable import Buffer, Executable
from jaxptis.executor.instructions import Rows
from jaxptis.executor.programs import Aval, ProgramSpec, split_program
from passes.device_split import DeviceSplit

Homes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The copies of the leaves of a pytree: for each leaf the devices that hold one."""

    homes: tuple[Homes, ...]
    prefix: str
    avals: tuple[Aval, ...]

    def buffers(self) -> dict[Buffer, Aval]:
        """Return the buffers of all copies, leaf by leaf, and their types."""
        return {
            (device, f"{self.prefix}{i}"): aval
            for i, (homes, aval) in enumerate(zip(self.homes, self.avals, strict=True))
            for device in homes
        }


class Draft:
    """A step while it is put together: its instructions, programs, inputs and constants."""

    def __init__(self, num_devices: int) -> None:
        self.rows = Rows(num_devices)
        self.specs: dict[str, ProgramSpec] = {}
        self.inputs: dict[Buffer, Aval] = {}
        self.constants: dict[Buffer, Any] = {}

    def split(
        self, split: DeviceSplit, prefix: str, inputs: Sequence[str]
    ) -> list[tuple[str, Homes]]:
        """Add the phases of a split; returns buffer and homes of each output."""
        for index, phase in enumerate(split.phases):
            for program in phase.programs:
                name = split_program_name(prefix, index, program.device)
                self.specs[name] = split_program(prefix, program)
        return emit_split(self.rows, split, prefix, inputs=inputs)

    def constants_of_split(
        self, split: DeviceSplit, names: Sequence[str], values: Sequence[Any]
    ) -> None:
        """Bind the values of the first inputs of a split on the devices that read them."""
        for place, name, value in zip(split.inputs, names, values, strict=False):
            self.constants.update({(device, name): value for device in place.homes})

    def share(self, wanted: Mapping[str, Homes]) -> list[Buffer]:
        """Add the transfers that bring buffers from their first homes to the others.

        A device that has been given a buffer passes it on, so that all have it soon.
        """
        for name, homes in wanted.items():
            count = 1
            while count < len(homes):
                for source, target in zip(homes[:count], homes[count:], strict=False):
                    self.rows.transfer(source, target, name)
                count *= 2
        return [(device, name) for name, homes in wanted.items() for device in homes]

    def executable(
        self,
        compiler: Compiler,
        what: str,
        outputs: Sequence[Buffer],
        consumed: Sequence[Buffer] = (),
        like: Executable | None = None,
    ) -> Executable:
        """Compile the step, which is called `what` in messages; or run the programs of `like`."""
        rows = enumerate(self.rows.rows)
        read = {(device, name) for device, row in rows for each in row for name in each.reads}
        constants = {
            (device, name): jax.device_put(value, compiler.devices[device])
            if compiler.is_local(device)
            else value
            for (device, name), value in self.constants.items()
            if (device, name) in read
        }
        return Executable(
            compiler,
            what=what,
            rows=self.rows,
            specs=self.specs,
            inputs=self.inputs,
            outputs=outputs,
            constants=constants,
            consumed=consumed,
            like=like,
        )
