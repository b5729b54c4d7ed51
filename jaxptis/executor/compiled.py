"""Compiles programs for their devices, each distinct one once, many at a time."""

import collections
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxptis.executor.programs import Aval, ProgramSpec
from jaxptis.executor.transfer import Exchange, Route
from jaxptis.processes import Processes, is_local
from passes import jaxprs


@dataclass(frozen=True)
class CompiledProgram:
    """A program, open to inspection; one of another process is compiled when it is looked at."""

    spec: ProgramSpec
    _lower: Callable[[], Any]
    _options: Mapping[str, Any]

    @functools.cached_property
    def lowered(self) -> Any:
        """What JAX made of it for XLA."""
        return self._lower()

    @functools.cached_property
    def compiled(self) -> Any:
        """What XLA made of it, which can be called."""
        return self.lowered.compile(compiler_options=dict(self._options))

    def as_text(self, form: str) -> str:
        """Return the program as "jaxpr", as "stablehlo", or as "hlo" (what XLA made of it).

        Raises:
          ValueError: `form` is none of these.
        """
        match form:
            case "jaxpr":
                return str(self.spec.jaxpr)
            case "stablehlo":
                return self.lowered.as_text()
            case "hlo":
                return self.compiled.as_text()
        raise ValueError(f"there is no form {form!r}; use 'jaxpr', 'stablehlo' or 'hlo'")

    def cost_analysis(self) -> dict[str, float]:
        """Return XLA's counts, among them `flops` and `bytes accessed`."""
        return self.compiled.cost_analysis()

    @property
    def temporary_bytes(self) -> int:
        """What it needs beside its inputs and results."""
        memory = self.memory_analysis()
        return memory.temp_size_in_bytes if memory else 0

    def memory_analysis(self) -> Any:
        """Return XLA's sizes of arguments, results and temporaries, in bytes."""
        return self.compiled.memory_analysis()


def device_mesh(devices: Sequence[Any]) -> Mesh:
    """Return the mesh of a stage on one device, or of all devices that hold one parameter."""
    return Mesh(np.array(devices).reshape(-1, 1), ("data", "model"))


def replicated(devices: Sequence[Any]) -> NamedSharding:
    """Return the sharding of an array that each of `devices` holds whole."""
    return NamedSharding(device_mesh(devices), PartitionSpec())


class Compiler:
    """Compiles for a fixed list of devices and remembers what it has compiled.

    Of devices of several processes each process compiles what runs on its own.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        self.devices = tuple(devices)
        self.processes = Processes(self.devices)
        self._programs: dict[tuple[Any, ...], CompiledProgram] = {}
        self._exchanges: dict[Route, Exchange] = {}
        self._placeholders: dict[tuple[int, Aval], Any] = {}

    @property
    def num_compilations(self) -> int:
        """How many programs XLA has compiled so far."""
        programs = {id(p.compiled) for p in self._programs.values()}
        return len(programs) + len(self._exchanges)

    def program(self, spec: ProgramSpec, donated: tuple[int, ...]) -> CompiledProgram:
        """Return a program that is compiled when it is looked at; see `programs`."""
        options = jaxprs.least_memory(self.devices[0].platform)
        return CompiledProgram(spec, functools.partial(self._lower, spec, donated), options)

    def programs(
        self, specs: Mapping[str, ProgramSpec], donated: Mapping[str, tuple[int, ...]]
    ) -> dict[str, CompiledProgram]:
        """Compile programs, by name; equal ones of one device are compiled once.

        Args:
          specs: the programs.
          donated: for each the positions of inputs that XLA may overwrite.
        """
        programs = {name: self.program(spec, donated[name]) for name, spec in specs.items()}
        keys = {
            name: (programs[name].lowered.as_text(), spec.device, donated[name])
            for name, spec in specs.items()
            if self.is_local(spec.device)
        }
        missing = {key: name for name, key in keys.items() if key not in self._programs}
        first = {text: (text, *rest) for text, *rest in reversed(missing)}
        # Programs that differ in their device only come second: where the backend's programs are
        # not bound to a device (GPU), JAX's compilation cache has them by then.
        for wave in (first.values(), missing.keys() - set(first.values())):
            _in_parallel(lambda key: programs[missing[key]].compiled, wave)
            self._programs.update((key, programs[missing[key]]) for key in wave)
        return programs | {name: self._programs[key] for name, key in keys.items()}

    def exchanges(self, routes: Sequence[Route]) -> dict[Route, Exchange]:
        """Compile transfers, each distinct one once."""
        new = {
            route: Exchange(route, self.devices, self._placeholder)
            for route in dict.fromkeys(routes)
            if route not in self._exchanges
        }
        _in_parallel(lambda exchange: exchange.compile(), new.values())
        self._exchanges.update(new)
        return {route: self._exchanges[route] for route in routes}

    def is_local(self, device: int) -> bool:
        """Whether a device belongs to this process."""
        return is_local(self.devices[device])

    def one_per_process(self, first: int) -> tuple[int, ...]:
        """Return a device, and then one of each other process."""
        chosen = {self.devices[first].process_index: first}
        for i, device in enumerate(self.devices):
            chosen.setdefault(device.process_index, i)
        return tuple(chosen.values())

    def elsewhere(self, device: int, aval: Aval) -> jax.Array:
        """Return what stands, in this process, for an array on a device of another."""
        sharding = replicated([self.devices[device]])
        return jax.make_array_from_single_device_arrays(aval.shape, sharding, [], dtype=aval.dtype)

    def _placeholder(self, device: int, aval: Aval) -> Any:
        key = device, aval
        if key not in self._placeholders:
            zeros = jnp.zeros(aval.shape, aval.dtype)
            self._placeholders[key] = jax.device_put(zeros, self.devices[device])
        return self._placeholders[key]

    def _lower(self, spec: ProgramSpec, donated: tuple[int, ...]) -> Any:
        sharding = replicated([self.devices[spec.device]])

        def program(*args: Any) -> list[Any]:
            return spec.fun(*args)

        program.__name__ = spec.kind
        mapped = jax.shard_map(
            program,
            mesh=sharding.mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        avals = [Aval(a.shape, a.dtype, sharding=sharding) for a in spec.in_avals]
        return jax.jit(mapped, donate_argnums=donated).lower(*avals)


def donations(spec: ProgramSpec, consumed: Sequence[int]) -> tuple[int, ...]:
    """Return those of the `consumed` inputs whose memory a result of the same type can take."""
    free = collections.Counter((a.shape, a.dtype) for a in spec.out_avals)
    donated = []
    # From the back: sums of gradients stand last, and each has its own result to become.
    for position in sorted(consumed, reverse=True):
        aval = spec.in_avals[position]
        if free[aval.shape, aval.dtype]:
            free[aval.shape, aval.dtype] -= 1
            donated.append(position)
    return tuple(sorted(donated))


def _in_parallel(function: Any, items: Any) -> list[Any]:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(function, items))
