"""The programs of a step, before they are compiled: a function, its types, its device."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from passes import jaxprs
from passes.device_split import DeviceProgram
from passes.differentiate import accumulator_dtype
from passes.jaxprs import Jaxpr
from passes.stages import Role, StageProgram

Aval = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """A program of one device.

    Attributes:
      kind: what it is called in its HLO; equal stages have equal programs.
      device: where it runs.
      fun: takes the inputs one by one, returns a list.
      in_avals: of the inputs.
      out_avals: of the results.
      jaxpr: what it computes, for people to read.
    """

    kind: str
    device: int
    fun: Callable[..., list[Any]]
    in_avals: tuple[Aval, ...]
    out_avals: tuple[Aval, ...]
    jaxpr: Jaxpr


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLeaf:
    """A leaf of the whole batch, and how a microbatch is cut out of it.

    Attributes:
      aval: of the whole leaf.
      axis: the batch axis; None gives every microbatch the whole leaf.
      size: of a microbatch along that axis.
    """

    aval: Aval
    axis: int | None
    size: int

    def microbatch(self, leaf: Any, index: Any) -> Any:
        """Cut microbatch `index` out of the whole leaf."""
        if self.axis is None:
            return leaf
        start = index * self.size
        return jax.lax.dynamic_slice_in_dim(leaf, start, self.size, self.axis)

    def microbatch_aval(self) -> Aval:
        """The type of a microbatch."""
        if self.axis is None:
            return self.aval
        shape = list(self.aval.shape)
        shape[self.axis] = self.size
        return Aval(tuple(shape), self.aval.dtype)


INDEX = Aval((), jnp.int32)


def needs_index(program: StageProgram, batch: Sequence[BatchLeaf]) -> bool:
    """Whether a program of a stage must know which microbatch it works on."""
    leaves = [batch[x.index] for x in program.reads if x.role == Role.BATCH]
    return any(leaf.axis is not None for leaf in leaves)


def stage_program(
    kind: str, program: StageProgram, *, device: int, batch: Sequence[BatchLeaf]
) -> ProgramSpec:
    """Return a program of a stage, which is given whole batch leaves.

    If `needs_index`, the index of the microbatch comes first; then what the program reads.
    """
    indexed = needs_index(program, batch)
    leaves = [batch[x.index] if x.role == Role.BATCH else None for x in program.reads]

    def fun(*args: Any) -> list[Any]:
        index, given = (args[0], args[1:]) if indexed else (None, args)
        cut = [
            x if leaf is None else leaf.microbatch(x, index)
            for leaf, x in zip(leaves, given, strict=True)
        ]
        return jaxprs.evaluate(program.jaxpr, cut)

    avals = jaxprs.avals(program.jaxpr.invars)
    given = [a if leaf is None else leaf.aval for leaf, a in zip(leaves, avals, strict=True)]
    return ProgramSpec(
        kind=kind,
        device=device,
        fun=fun,
        in_avals=(*[INDEX] * indexed, *given),
        out_avals=tuple(jaxprs.avals(program.jaxpr.outvars)),
        jaxpr=program.jaxpr,
    )


def zeros_program(params: Sequence[Aval], *, device: int) -> ProgramSpec:
    """Return the program that makes the sums of gradients, one a parameter, all zero."""
    avals = tuple(Aval(a.shape, accumulator_dtype(a.dtype)) for a in params)
    return plain_program(
        "zeros", lambda: [jnp.zeros(a.shape, a.dtype) for a in avals], (), device=device
    )


def results_program(
    results: Sequence[tuple[Aval, int | None]], num_microbatches: int, *, device: int
) -> ProgramSpec:
    """Return the program that joins the results of all microbatches.

    Args:
      results: the type of each result of a microbatch, and the axis along which microbatches are
        concatenated; None takes their mean.
      num_microbatches: how many results of each there are; all of the first come first.
      device: where they are.
    """
    edges = range(0, len(results) * num_microbatches + 1, num_microbatches)
    axes = [axis for _, axis in results]

    def fun(*args: Any) -> list[Any]:
        groups = [args[a:b] for a, b in pairwise(edges)]
        if num_microbatches == 1:
            return [group[0] for group in groups]
        return [
            jnp.mean(jnp.stack(group), axis=0) if axis is None else jnp.concatenate(group, axis)
            for group, axis in zip(groups, axes, strict=True)
        ]

    avals = tuple(aval for aval, _ in results for _ in range(num_microbatches))
    return plain_program("results", fun, avals, device=device)


def split_program(kind: str, program: DeviceProgram) -> ProgramSpec:
    """Return the program of one device and phase of a split update."""
    return ProgramSpec(
        kind=kind,
        device=program.device,
        fun=lambda *args: jaxprs.evaluate(program.jaxpr, args),
        in_avals=tuple(jaxprs.avals(program.jaxpr.invars)),
        out_avals=tuple(jaxprs.avals(program.jaxpr.outvars)),
        jaxpr=program.jaxpr,
    )


def plain_program(
    kind: str, fun: Callable[..., list[Any]], avals: tuple[Aval, ...], *, device: int
) -> ProgramSpec:
    """Return the program of a function that closes over no array."""
    jaxpr, _, out = jaxprs.trace(fun, *avals)
    return ProgramSpec(
        kind=kind, device=device, fun=fun, in_avals=avals, out_avals=tuple(out), jaxpr=jaxpr
    )
