"""Replace parameters of which only slices are read by these slices, each a parameter of its own."""

import dataclasses

from passes import jaxprs
from passes.boxes import Pieces, partition, shifted, whole
from passes.in_parts import compute_demands, find_demands
from passes.jaxprs import Var
from passes.program import Program


def split_params(program: Program) -> Program:
    """Return the program with the parameters that it reads in slices cut into these.

    The slices may be of what is computed from parameters and constants, such as a stack of kernels
    after a transpose and a cast: the slices are taken first then, and each is transposed and cast
    by itself. A parameter of which only one slice is read stays whole, and so does one that is also
    read whole. Slices that nobody reads become parameters, too.
    """
    jaxpr = program.jaxpr
    of_batch = jaxprs.dependents(jaxpr, program.batch_vars)
    weights = jaxprs.dependents(jaxpr, program.param_vars) - of_batch
    demands = find_demands(
        jaxpr,
        outputs=[(whole(aval.shape),) for aval in jaxprs.avals(jaxpr.outvars)],
        pieces={},
        through=lambda eqn: weights.issuperset(eqn.outvars),
    )
    pieces: dict[Var, Pieces] = {}
    for v in program.param_vars:
        parts = partition(whole(jaxprs.shape_of(v)), demands.boxes.get(v, ()))
        if len(parts) > 1:
            pieces[v] = tuple(parts)
    if not pieces:
        return program
    split = compute_demands(dataclasses.replace(demands, pieces=pieces))
    sources = [
        dataclasses.replace(source, box=shifted(piece, [start for start, _ in source.box]))
        for source, v in zip(program.sources, program.param_vars, strict=True)
        for piece in pieces.get(v, (whole(jaxprs.shape_of(v)),))
    ]
    return dataclasses.replace(program, jaxpr=split, sources=tuple(sources))
