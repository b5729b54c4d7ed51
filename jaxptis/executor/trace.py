"""When the instructions of GPUs ran, from the trace of a step that ran as it always does.

A GPU runs one program after the other, in the order of its list, and JAX's profiler notes the
program of every kernel. So the kernels of a device are cut, in order of time, where the program
changes; and where one program is run several times in a row, into parts of equally many.
"""

import itertools
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax

from jaxptis.executor.record import Happening

Results = TypeVar("Results")


class Kernel(NamedTuple):
    """What a GPU ran: times are on the clock of its process, a program is numbered by XLA."""

    start_s: float
    end_s: float
    module: str
    program: int


class Launch(NamedTuple):
    """An instruction: its position in the list of its device, and the program that it runs.

    Attributes:
        position: in the list.
        module: the name of the program's HLO module.
        program: the same for instructions that run the same.
    """

    position: int
    module: str
    program: int


def traced(run: Callable[[], Results]) -> tuple[Results, dict[int, list[Kernel]]]:
    """Run a step to its end; return what it returns, and the kernels of each GPU, by its index."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            results = jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
        return results, kernels_of(jax.profiler.ProfileData.from_file(str(path)))


def kernels_of(data: jax.profiler.ProfileData) -> dict[int, list[Kernel]]:
    """Return the kernels in a trace, of each GPU by its index, in the order of their starts."""
    prefix = "/device:GPU:"
    with warnings.catch_warnings():
        # On Python 3.12 a type of jaxlib is deprecated when first used: as an error, that aborts.
        warnings.simplefilter("ignore", DeprecationWarning)
        return {
            int(plane.name.removeprefix(prefix)): sorted(
                kernel for line in plane.lines for kernel in _kernels(line)
            )
            for plane in data.planes
            if plane.name.startswith(prefix)
        }


def _kernels(line: object) -> Iterator[Kernel]:
    for event in line.events:  # type: ignore[attr-defined]
        stats = dict(event.stats)
        if "program_id" in stats and "hlo_module" in stats:
            start_s = event.start_ns * 1e-9
            end_s = start_s + event.duration_ns * 1e-9
            yield Kernel(start_s, end_s, stats["hlo_module"], stats["program_id"])


def happenings_of(
    device: int, launches: Sequence[Launch], kernels: Sequence[Kernel]
) -> list[Happening]:
    """Return when each instruction of a device ran.

    One without kernels, such as a program that hands on what it is given, took no time.

    Args:
        device: its number in the pipeline.
        launches: its instructions.
        kernels: that it ran, in the order of their starts.

    Raises:
        ValueError: the kernels are not those of the instructions.
    """
    if not kernels:
        raise _unlike(device, "there are no kernels in it")
    groups = [list(group) for _, group in itertools.groupby(kernels, lambda each: each.program)]
    numbers: dict[int, int | None] = {}
    found, at = [], kernels[0].start_s
    for program, run in itertools.groupby(launches, lambda each: each.program):
        each_of_run = list(run)
        group = groups[0] if groups else None
        if program not in numbers:
            numbers[program] = _number(group, each_of_run[0].module, numbers)
        parts: Sequence[Sequence[Kernel]] = [[] for _ in each_of_run]
        if numbers[program] is not None:
            parts = _parts(device, groups, numbers[program], each_of_run)
        for launch, part in zip(each_of_run, parts, strict=True):
            start_s = part[0].start_s if part else at
            at = max((kernel.end_s for kernel in part), default=at)
            found.append(
                Happening(device=device, position=launch.position, start_s=start_s, end_s=at)
            )
    if groups:
        raise _unlike(device, f"{groups[0][0].module} runs after the last instruction")
    return found


def _number(
    group: Sequence[Kernel] | None, module: str, numbers: Mapping[int, int | None]
) -> int | None:
    """Return XLA's number of a program when it is run first; None if it has no kernels."""
    if group is None or group[0].module != module or group[0].program in numbers.values():
        return None
    return group[0].program


def _parts(
    device: int, groups: list[list[Kernel]], number: int | None, launches: Sequence[Launch]
) -> list[list[Kernel]]:
    """Take the kernels of the next launches, which are of one program, from the groups."""
    module = launches[0].module
    if not groups or groups[0][0].program != number:
        raise _unlike(device, f"{module} should run, and another program does")
    group = groups.pop(0)
    size, rest = divmod(len(group), len(launches))
    if rest:
        raise _unlike(device, f"{len(launches)} runs of {module} have {len(group)} kernels")
    return [group[k * size : (k + 1) * size] for k in range(len(launches))]


def _unlike(device: int, what: str) -> ValueError:
    return ValueError(
        f"the trace of device {device} is not that of its instructions: {what}; profile again "
        "when nothing else runs on this device, and see that CUPTI may trace it"
    )
