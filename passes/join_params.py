"""Make parameters whole again that were cut into slices which are all read together."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import jax

from passes import jaxprs
from passes.boxes import whole
from passes.program import Program


def join_params(program: Program, read: Iterable[Collection[int]]) -> Program:
    """Return the program with each leaf whole of which no two of `read` have a slice.

    A kernel of which one layer reads each tap by itself is no stack of layers' kernels.

    Args:
      program: some of its parameters are slices of one leaf.
      read: the parameters that each layer reads.
    """
    readers = [set(params) for params in read]
    joined = [
        parts
        for parts in program.leaves
        if len(parts) > 1 and sum(not params.isdisjoint(parts) for params in readers) < 2
    ]
    if not joined:
        return program
    sources = program.sources
    boxes = {parts[0]: [sources[p].box for p in parts] for parts in joined}
    dropped = {p for parts in joined for p in parts[1:]}
    kept = [p for p in range(len(sources)) if p not in dropped]
    avals = {parts[0]: leaf for parts, leaf in zip(program.leaves, program.leaf_avals, strict=True)}
    params = [
        avals[p] if p in boxes else aval
        for p, aval in zip(kept, jaxprs.avals(program.param_vars[p] for p in kept), strict=True)
    ]

    def sliced(constants: Any, given: Any, batch: Any) -> list[Any]:
        values = itertools.chain.from_iterable(
            [jax.lax.slice(x, *zip(*box, strict=True)) for box in boxes[p]] if p in boxes else [x]
            for p, x in zip(kept, given, strict=True)
        )
        return jaxprs.evaluate(program.jaxpr, [*constants, *values, *batch])

    jaxpr, new, _ = jaxprs.trace(
        sliced, jaxprs.avals(program.constant_vars), params, jaxprs.avals(program.batch_vars)
    )
    return dataclasses.replace(
        program,
        jaxpr=jaxpr,
        constants=(*new, *program.constants),
        sources=tuple(
            dataclasses.replace(sources[p], box=whole(sources[p].shape))
            if p in boxes
            else sources[p]
            for p in kept
        ),
    )
