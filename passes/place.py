"""Decide which device computes each equation of a jaxpr whose inputs are spread over devices.

A value is *placed* if it depends on an input with a home: it is computed once, where its operands
are. Every other value (a step count, a learning rate, zeros) is *floating*: each device that reads
it computes it for itself.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from passes import jaxprs
from passes.jaxprs import Jaxpr, Literal, Var

Homes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tied:
    """An output's home: wherever the input of this index lives, whose next value it is."""

    input: int


Output = tuple[Var | Literal, Homes | Tied | None]  # and where it must end up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the values of a jaxpr are.

    Attributes:
      jaxpr: what was placed.
      devices: for each variable, the devices that hold it without a transfer, the owner first: an
        input's homes, or where its equation runs. Empty: nobody needs it.
      output_homes: where each output must end up, the owner first.
    """

    jaxpr: Jaxpr
    devices: Mapping[Var, Homes]
    output_homes: tuple[Homes, ...]

    def origin(self, var: Var, device: int) -> int:
        """Return the device that `device` gets `var` from; itself if it need not be moved."""
        return device if device in self.devices[var] else self.devices[var][0]


def place(
    jaxpr: Jaxpr,
    *,
    input_homes: Sequence[Homes | None],
    output_homes: Sequence[Homes | Tied | None],
) -> Placement:
    """Place every equation of `jaxpr`; `split_by_device` says what the homes mean."""
    _check_homes(jaxpr, input_homes, output_homes)
    outputs = list(zip(jaxpr.outvars, output_homes, strict=True))
    given = {v: h for v, h in zip(jaxpr.invars, input_homes, strict=True) if h is not None}
    given |= _homes_of_state(jaxpr, given, outputs)
    explicit = [h for h in (*input_homes, *output_homes) if isinstance(h, tuple)]
    default = min((d for homes in explicit for d in homes), default=0)
    pinned: dict[Var, int] = {}
    while True:
        placed = given | _place_equations(jaxpr, given, pinned)
        demands = _Demands(jaxpr, placed, default)
        demands.add_outputs(outputs)
        homes = tuple(demands.home(atom, want) for atom, want in outputs)
        more = _pins(jaxpr, placed, homes)
        if not more:
            variables = [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
            devices = {v: demands.where(v) for v in variables}
            return Placement(jaxpr=jaxpr, devices=devices, output_homes=homes)
        pinned |= more


def _check_homes(jaxpr: Jaxpr, input_homes: Sequence, output_homes: Sequence) -> None:
    """Raise unless every input and output has exactly one sensible home."""
    for kind, atoms, all_homes in (
        ("input", jaxpr.invars, input_homes),
        ("output", jaxpr.outvars, output_homes),
    ):
        if len(atoms) != len(all_homes):
            raise ValueError(f"{len(atoms)} {kind}s but {len(all_homes)} homes; give one for each")
        for index, homes in enumerate(all_homes):
            if isinstance(homes, tuple) and not (homes and len(set(homes)) == len(homes)):
                raise ValueError(
                    f"{kind} {index} has homes {homes}; give at least one device, each once, or "
                    "None to let the pass decide"
                )
            if isinstance(homes, Tied) and homes.input not in range(len(input_homes)):
                raise ValueError(
                    f"output {index} is tied to input {homes.input}; there are {len(input_homes)}"
                )


def _homes_of_state(
    jaxpr: Jaxpr, given: Mapping[Var, Homes], outputs: Sequence[Output]
) -> dict[Var, Homes]:
    """Return a home for the arrays, among the undecided inputs, whose next value is placed.

    Such an array is the state of some placed array, and lives with the first that it meets, though
    it may meet a scalar from elsewhere before. (A key, whose next value floats, does not.)
    """
    threaded = {jaxpr.invars[w.input]: atom for atom, w in outputs if isinstance(w, Tied)}
    is_placed = jaxprs.dependents(jaxpr, given)
    state = [
        v
        for v, next_value in threaded.items()
        if v not in given
        and _is_array(v)
        and isinstance(next_value, Var)
        and next_value in is_placed
    ]
    roots = {v: [v] for v in state}
    homes = {v: h for v, h in given.items() if _is_array(v)}
    for eqn in jaxpr.eqns:
        operands = list(jaxprs.reads(eqn))
        placed = [v for v in operands if v in homes]
        met = list(dict.fromkeys(r for v in operands for r in roots.get(v, ())))
        arrays = [v for v in eqn.outvars if _is_array(v)]
        if not placed:
            roots.update((v, met) for v in arrays)
            continue
        device = (_choose(placed, homes),)
        homes |= {r: device for r in met if r not in homes} | dict.fromkeys(arrays, device)
    return {v: homes[v] for v in state if v in homes}


def _place_equations(
    jaxpr: Jaxpr, given: Mapping[Var, Homes], pinned: Mapping[Var, int]
) -> dict[Var, Homes]:
    """Return the device, as a tuple, of every value that is placed or `pinned`."""
    made: dict[Var, Homes] = {}
    copies = dict(given)  # and where they were moved
    for eqn in jaxpr.eqns:
        operands = [v for v in jaxprs.reads(eqn) if v in copies]
        device = next((pinned[v] for v in eqn.outvars if v in pinned), None)
        if device is None and operands:
            device = _choose(operands, copies)
        if device is None:
            continue
        copies |= {v: (*copies[v], device) for v in operands if device not in copies[v]}
        copies |= dict.fromkeys(eqn.outvars, (device,))
        made |= dict.fromkeys(eqn.outvars, (device,))
    return made


def _choose(operands: Sequence[Var], homes: Mapping[Var, Homes]) -> int:
    """Return the device that holds all operands, or else most of their bytes; the first of equals.

    A device comes before another if an earlier operand has it, or has it earlier.
    """
    held: dict[int, int] = {}
    for v in dict.fromkeys(operands):
        for device in homes[v]:
            held[device] = held.get(device, 0) + jaxprs.nbytes([v.aval])
    return max(held, key=lambda device: (all(device in homes[v] for v in operands), held[device]))


def _pins(
    jaxpr: Jaxpr, placed: Mapping[Var, Homes], output_homes: Sequence[Homes]
) -> dict[Var, int]:
    """Return the floating arrays that must be equal on several devices, and the one to make each.

    What is not an array is computed on each of them instead.
    """
    settled = placed.keys() | set(jaxpr.invars)
    return {
        v: homes[0]
        for v, homes in zip(jaxpr.outvars, output_homes, strict=True)
        if len(homes) > 1 and isinstance(v, Var) and _is_array(v) and v not in settled
    }


def _is_array(v: Var) -> bool:
    return len(jaxprs.avals([v])[0].shape) > 0


class _Demands:
    """The devices that need each floating value: grows until each output has what it needs."""

    def __init__(self, jaxpr: Jaxpr, placed: Mapping[Var, Homes], default: int) -> None:
        self.jaxpr = jaxpr
        self.placed = placed
        self.default = default
        self.floating: dict[Var, set[int]] = {}
        self.producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        for eqn in jaxpr.eqns:
            for device in placed.get(eqn.outvars[0], ()):
                for v in jaxprs.reads(eqn):
                    self.add(v, device)

    def add(self, atom: Var | Literal, device: int) -> bool:
        """Demand `atom`, and what it is computed from, on `device`; return whether that is new."""
        if isinstance(atom, Literal) or atom in self.placed:
            return False
        if device in self.floating.get(atom, ()):
            return False
        stack = [atom]
        while stack:
            v = stack.pop()
            if v in self.placed or device in self.floating.setdefault(v, set()):
                continue
            self.floating[v].add(device)
            if v in self.producers:
                stack += [*self.producers[v].outvars, *jaxprs.reads(self.producers[v])]
        return True

    def where(self, atom: Var | Literal) -> Homes:
        """Return the devices that have `atom` without a transfer, as far as is known."""
        if isinstance(atom, Literal):
            return ()
        return self.placed.get(atom) or tuple(sorted(self.floating.get(atom, ())))

    def home(self, atom: Var | Literal, want: Homes | Tied | None) -> Homes:
        """Return where the output `atom` has to be, as far as is known."""
        if isinstance(want, Tied):
            return self.where(self.jaxpr.invars[want.input])
        if want is None:
            return (self.default,) if isinstance(atom, Literal) else self.where(atom)[:1]
        return want

    def add_outputs(self, outputs: Sequence[Output]) -> None:
        """Demand every output where it has to be."""
        grows = True
        while grows:
            news = [self.add(atom, d) for atom, want in outputs for d in self.home(atom, want)]
            grows = any(news) or self._settle(outputs)

    def _settle(self, outputs: Sequence[Output]) -> bool:
        """Give homes to outputs that have none yet; return whether there were any.

        A tied input that nobody reads lives where its next value is computed. If no such place is
        known either, the default device is taken.
        """
        idle = [
            (atom, self.jaxpr.invars[want.input] if isinstance(want, Tied) else atom)
            for atom, want in outputs
            if not self.home(atom, want)
        ]
        known = [(target, self.where(atom)[0]) for atom, target in idle if self.where(atom)]
        for target, device in known or [(target, self.default) for _, target in idle]:
            self.add(target, device)
        return bool(idle)
