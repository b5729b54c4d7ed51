"""Decide when each equation of a placed jaxpr runs, and what crosses together."""

import collections
import dataclasses
from collections.abc import Mapping

import jax

from passes import jaxprs
from passes.jaxprs import JaxprEqn, Literal, Var
from passes.place import Placement

Site = tuple[Var, int]  # a value on a device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timetable:
    """When things happen.

    Attributes:
      made: the phase in which a value is computed on a device.
      sent: the phase after which a value is moved to a device.
      last: the last phase with equations.
    """

    made: Mapping[Site, int]
    sent: Mapping[Site, int]
    last: int


def find_timetable(placement: Placement) -> Timetable:
    """Give every equation and move a phase.

    Equations run as late as they can, beside those that read them, so that little is kept from
    phase to phase; but what reduces its data runs at once.
    """
    earliest = _earliest(placement)
    last = max(earliest.values(), default=0)
    due: dict[Site, int] = {}

    def need(v: Var, device: int, phase: int) -> None:
        due[v, device] = min(phase, due.get((v, device), phase))
        origin = placement.origin(v, device)
        if origin != device:
            due[v, origin] = min(phase - 1, due.get((v, origin), phase - 1))

    for v, homes in zip(placement.jaxpr.outvars, placement.output_homes, strict=True):
        if isinstance(v, Literal):
            continue
        for device in homes:
            origin = placement.origin(v, device)
            need(v, device, last if origin == device else max(last, earliest[v, origin] + 1))
    made = {}
    for eqn in reversed(placement.jaxpr.eqns):
        for device in placement.devices[eqn.outvars[0]]:
            sites = [(v, device) for v in eqn.outvars]
            late = min(due[site] for site in sites if site in due)
            phase = earliest[sites[0]] if _reduces(eqn) else late
            made.update(dict.fromkeys(sites, phase))
            for v in jaxprs.reads(eqn):
                need(v, device, phase)
    sent = {(v, d): phase - 1 for (v, d), phase in due.items() if placement.origin(v, d) != d}
    return Timetable(made=made, sent=sent, last=last)


def _earliest(placement: Placement) -> dict[Site, int]:
    """Return the first phase in which each value can be on each of its devices."""
    earliest = {(v, d): 0 for v in placement.jaxpr.invars for d in placement.devices[v]}
    for eqn in placement.jaxpr.eqns:
        for device in placement.devices[eqn.outvars[0]]:
            origins = [(v, placement.origin(v, device)) for v in jaxprs.reads(eqn)]
            phase = max((earliest[v, d] + (d != device) for v, d in origins), default=0)
            earliest.update(((v, device), phase) for v in eqn.outvars)
    return earliest


def _reduces(eqn: JaxprEqn) -> bool:
    """Whether the result is much smaller (not just narrower) than an operand."""
    largest = max((jaxprs.nbytes([v.aval]) for v in jaxprs.reads(eqn)), default=0)
    return 4 * jaxprs.nbytes(v.aval for v in eqn.outvars) < largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parcel:
    """Values of one dtype that cross together after a phase; more than one are packed."""

    phase: int
    source: int
    target: int
    values: tuple[Var, ...]
    name: str

    @property
    def is_packed(self) -> bool:
        return len(self.values) > 1

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """The type of the array that crosses, if it is packed."""
        avals = jaxprs.avals(self.values)
        return jax.ShapeDtypeStruct((sum(aval.size for aval in avals),), avals[0].dtype)


def find_parcels(
    placement: Placement, times: Timetable, names: Mapping[Var, str]
) -> tuple[Parcel, ...]:
    """Group what crosses. Keys (of `jax.random`) have no common array and cross alone."""
    groups = collections.defaultdict(list)
    targets = collections.defaultdict(list)
    for v, target in times.sent:
        targets[v].append(target)
    for v, name in names.items():
        dtype = jaxprs.avals([v])[0].dtype
        alone = jax.numpy.issubdtype(dtype, jax.dtypes.extended)
        for target in targets[v]:
            edge = (times.sent[v, target], placement.origin(v, target), target)
            groups[(*edge, name if alone else str(dtype))].append(v)
    return tuple(
        Parcel(
            phase=phase,
            source=source,
            target=target,
            values=tuple(values),
            name=names[values[0]] if len(values) == 1 else f"packed{n}",
        )
        for n, ((phase, source, target, _), values) in enumerate(
            sorted(groups.items(), key=lambda item: item[0])
        )
    )
