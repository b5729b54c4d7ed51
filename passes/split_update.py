"""Cut an optimizer update over devices: each equation runs where its data is."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from passes import jaxprs
from passes.device_split import DeviceProgram, DeviceSplit, Move, Phase, Place
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Var
from passes.phases import Parcel, Site, Timetable, find_parcels, find_timetable
from passes.place import Homes, Placement, Tied, place

__all__ = ["Tied", "split_by_device"]


def split_by_device(
    jaxpr: Jaxpr,
    *,
    input_homes: Sequence[Homes | None],
    output_homes: Sequence[Homes | Tied | None],
) -> DeviceSplit:
    """Cut `jaxpr` into programs of one device each, in as few phases as its dataflow allows.

    An equation runs on the device that holds its operands, or most of their bytes; the others are
    moved there. What depends on no input with a home runs on every device that reads it. What
    crosses together between two devices, in one dtype, crosses as one array.

    Args:
      jaxpr: the update of all parameters; equations that no output needs are left out.
      input_homes: the devices that hold a copy of each input, the owner first; None for state and
        constants, which live where they are read.
      output_homes: the devices that each output must end up on; `Tied` for state; None for
        wherever it is computed. Copies of an array are equal bitwise.

    Raises:
      ValueError: an input or output has not one sensible home.
      NotImplementedError: `jaxpr` has side effects.
    """
    if jaxpr.effects:
        guilty = sorted({eqn.primitive.name for eqn in jaxpr.eqns if eqn.effects})
        raise NotImplementedError(f"split_by_device: side effects of {', '.join(guilty)}")
    jaxpr = jaxprs.backward_slice(jaxpr, invars=jaxpr.invars, outvars=jaxpr.outvars)
    placement = place(jaxpr, input_homes=input_homes, output_homes=output_homes)
    names = _names(jaxpr)
    times = find_timetable(placement)
    parcels = find_parcels(placement, times, names)
    return DeviceSplit(
        phases=_phases(placement, times, parcels, names),
        inputs=tuple(Place(names[v], placement.devices[v]) for v in jaxpr.invars),
        outputs=tuple(
            Place(names[atom] if isinstance(atom, Var) else _literal_name(k), homes)
            for k, atom, homes in _outputs(placement)
        ),
    )


def _names(jaxpr: Jaxpr) -> dict[Var, str]:
    """Return a name for every variable, in the order in which they are bound."""
    made = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    names = {v: f"input{i}" for i, v in enumerate(jaxpr.invars)}
    return names | {v: f"value{n}" for n, v in enumerate(made)}


def _outputs(placement: Placement) -> Iterator[tuple[int, Var | Literal, Homes]]:
    """Yield index, variable or literal, and homes of each output."""
    for k, atom in enumerate(placement.jaxpr.outvars):
        yield k, atom, placement.output_homes[k]


def _literal_name(output: int) -> str:
    return f"output{output}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What one device does in one phase: unpack, compute, pack."""

    unpacked: list[Parcel] = dataclasses.field(default_factory=list)
    eqns: list[JaxprEqn] = dataclasses.field(default_factory=list)
    literals: list[tuple[str, Literal]] = dataclasses.field(default_factory=list)
    packed: list[Parcel] = dataclasses.field(default_factory=list)

    @property
    def made(self) -> list[Var]:
        """What the device did not hold before."""
        arrived = [v for parcel in self.unpacked for v in parcel.values]
        return [*arrived, *(v for eqn in self.eqns for v in eqn.outvars)]

    @property
    def leaving(self) -> list[Var]:
        return [v for parcel in self.packed for v in parcel.values]

    @property
    def reads(self) -> list[Var]:
        """What the device must hold before."""
        read = [*(v for eqn in self.eqns for v in jaxprs.reads(eqn)), *self.leaving]
        made = set(self.made)
        return [v for v in dict.fromkeys(read) if v not in made]


def _phases(
    placement: Placement,
    times: Timetable,
    parcels: Sequence[Parcel],
    names: Mapping[Var, str],
) -> tuple[Phase, ...]:
    """Return the programs and moves of every phase."""
    jobs = _jobs(placement, times, parcels)
    kept = _kept(placement, jobs, parcels)
    moves = collections.defaultdict(list)
    for parcel in parcels:
        move = Move(source=parcel.source, target=parcel.target, name=parcel.name)
        moves[parcel.phase].append(move)
    programs = collections.defaultdict(list)
    for (phase, device), job in sorted(jobs.items(), key=lambda item: item[0]):
        lasting = [v for v in job.made if kept.get((v, device), phase) > phase]
        programs[phase].append(_program(placement.jaxpr, device, job, lasting, names))
    count = 1 + max([*moves, *programs], default=-1)
    return tuple(
        Phase(programs=tuple(programs[phase]), moves=tuple(sorted(moves[phase])))
        for phase in range(count)
    )


def _jobs(
    placement: Placement, times: Timetable, parcels: Sequence[Parcel]
) -> dict[tuple[int, int], _Job]:
    """Return what is to be done, by phase and device."""
    jobs: dict[tuple[int, int], _Job] = collections.defaultdict(_Job)
    for eqn in placement.jaxpr.eqns:
        for device in placement.devices[eqn.outvars[0]]:
            jobs[times.made[eqn.outvars[0], device], device].eqns.append(eqn)
    for parcel in parcels:
        if parcel.is_packed:
            jobs[parcel.phase, parcel.source].packed.append(parcel)
            jobs[parcel.phase + 1, parcel.target].unpacked.append(parcel)
    for k, atom, homes in _outputs(placement):
        if isinstance(atom, Literal):
            for device in homes:
                jobs[times.last, device].literals.append((_literal_name(k), atom))
    return dict(jobs)


def _kept(
    placement: Placement, jobs: Mapping[tuple[int, int], _Job], parcels: Sequence[Parcel]
) -> dict[Site, float]:
    """Return the last phase that reads a value from what its device holds; inf for an output.

    A value that moves by itself is held until its phase is over.
    """
    kept: dict[Site, float] = {}
    for (phase, device), job in jobs.items():
        for v in job.reads:
            kept[v, device] = max(phase, kept.get((v, device), phase))
    for parcel in parcels:
        if not parcel.is_packed:
            site = (parcel.values[0], parcel.source)
            kept[site] = max(parcel.phase + 1, kept.get(site, 0))
    for _, atom, homes in _outputs(placement):
        if isinstance(atom, Var):
            kept.update(((atom, device), math.inf) for device in homes)
    return kept


def _program(
    jaxpr: Jaxpr, device: int, job: _Job, lasting: Sequence[Var], names: Mapping[Var, str]
) -> DeviceProgram:
    """Return the program that does `job` and keeps the values `lasting`."""
    arrived = [v for parcel in job.unpacked for v in parcel.values]
    literals = [literal for _, literal in job.literals]
    body = jaxprs.rebuild(
        jaxpr,
        invars=[*job.reads, *arrived],
        outvars=[*lasting, *literals, *job.leaving],
        eqns=job.eqns,
    )
    return DeviceProgram(
        device=device,
        jaxpr=_pack_ends(body, job) if job.unpacked or job.packed else body,
        inputs=(*(names[v] for v in job.reads), *(parcel.name for parcel in job.unpacked)),
        outputs=(
            *(names[v] for v in lasting),
            *(name for name, _ in job.literals),
            *(parcel.name for parcel in job.packed),
        ),
    )


def _pack_ends(body: Jaxpr, job: _Job) -> Jaxpr:
    """Return `body` with its last inputs and outputs replaced by the parcels they cross in."""
    num_reads = len(body.invars) - sum(len(parcel.values) for parcel in job.unpacked)
    num_results = len(body.outvars) - len(job.leaving)

    def run(*arrays: Any) -> list[Any]:
        args = list(arrays[:num_reads])
        for parcel, array in zip(job.unpacked, arrays[num_reads:], strict=True):
            args += _unpack(array, [aval.shape for aval in jaxprs.avals(parcel.values)])
        results = jaxprs.evaluate(body, args)
        leaving = iter(results[num_results:])
        packs = [_pack([next(leaving) for _ in parcel.values]) for parcel in job.packed]
        return [*results[:num_results], *packs]

    args = [*jaxprs.avals(body.invars[:num_reads]), *(parcel.aval for parcel in job.unpacked)]
    packing, constants, _ = jaxprs.trace(run, *args)
    assert not constants, "an open jaxpr has no constants"
    return packing


def _pack(arrays: Sequence[Any]) -> Any:
    """Return one vector with the elements of `arrays`."""
    return jax.lax.concatenate([jax.lax.reshape(array, (array.size,)) for array in arrays], 0)


def _unpack(vector: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Return what `_pack` packed."""
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    return [
        jax.lax.reshape(jax.lax.slice(vector, (end - math.prod(shape),), (end,)), shape)
        for shape, end in zip(shapes, ends, strict=True)
    ]
