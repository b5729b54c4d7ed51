"""From layers to stages: each stage becomes a program of its own."""

from collections.abc import Sequence
from itertools import pairwise

from passes import jaxprs
from passes.jaxprs import Literal, Var
from passes.layers import LayerGraph
from passes.program import Program
from passes.stages import Crossing, Stage, Stages

# Float to float, but without a gradient.
_NO_GRADIENT = ("stop_gradient", "sign", "floor", "ceil", "round")


def cut_stages(graph: LayerGraph, boundaries: Sequence[int]) -> Stages:
    """Cut the program of `graph`.

    A value that depends on parameters only, or on the batch only, is computed again in every stage
    that reads it; an activation crosses from its stage to those that read it, see `hand_on`. A
    parameter that no stage reads lives on the first.

    Args:
      graph: the layers.
      boundaries: index of the first layer of each stage, and the number of layers at the end.
    """
    program = graph.program
    made_in = _stage_of_values(graph, boundaries)
    crossings = _crossings(graph, made_in)
    last = len(boundaries) - 2
    results = [
        last if isinstance(v, Literal) else made_in.get(v, last) for v in program.jaxpr.outvars
    ]
    unread = set(program.param_vars) - jaxprs.read_vars(program.jaxpr)
    stages = tuple(
        _stage(
            program,
            crossings,
            s,
            results=tuple(r for r, where in enumerate(results) if where == s),
            held=unread if s == 0 else set(),
        )
        for s in range(last + 1)
    )
    return Stages(program=program, crossings=tuple(crossings.values()), stages=stages)


def _stage_of_values(graph: LayerGraph, boundaries: Sequence[int]) -> dict[Var, int]:
    """Return the stage that computes each activation."""
    eqns = graph.program.jaxpr.eqns
    made_in: dict[Var, int] = {}
    for s, (first, stop) in enumerate(pairwise(boundaries)):
        span = slice(graph.layers[first].start, graph.layers[stop - 1].stop)
        for i in graph.activations[span]:
            made_in.update((v, s) for v in eqns[i].outvars)
    return made_in


def _crossings(graph: LayerGraph, made_in: dict[Var, int]) -> dict[Var, Crossing]:
    """Return the activations that are read in a later stage than their own."""
    eqns = graph.program.jaxpr.eqns
    differentiated = _differentiated(graph.program)
    consumers: dict[Var, set[int]] = {}
    moving: set[Var] = set()
    for i in graph.activations:
        s = made_in[eqns[i].outvars[0]]
        for v in jaxprs.reads(eqns[i]):
            if made_in.get(v, s) != s:
                consumers.setdefault(v, set()).add(s)
                if i in differentiated and jaxprs.is_float(v.aval):
                    moving.add(v)
    return {
        v: Crossing(
            producer=made_in[v],
            consumers=tuple(sorted(stages)),
            aval=v.aval,
            has_gradient=v in moving,
        )
        for v, stages in consumers.items()
    }


def _differentiated(program: Program) -> set[int]:
    """Return the indices of the equations through which a gradient flows back from the loss."""
    reached = {v for v in program.jaxpr.outvars[:1] if isinstance(v, Var)}
    found = set()
    for i, eqn in reversed(list(enumerate(program.jaxpr.eqns))):
        if not reached.isdisjoint(eqn.outvars) and eqn.primitive.name not in _NO_GRADIENT:
            found.add(i)
            reached.update(v for v in jaxprs.reads(eqn) if jaxprs.is_float(v.aval))
    return found


def _stage(
    program: Program,
    crossings: dict[Var, Crossing],
    index: int,
    *,
    results: tuple[int, ...],
    held: set[Var],
) -> Stage:
    """Return one stage; it holds the parameters that it reads, and those of `held`."""
    inputs = [(i, v) for i, (v, c) in enumerate(crossings.items()) if index in c.consumers]
    outputs = [(i, v) for i, (v, c) in enumerate(crossings.items()) if index == c.producer]
    body = jaxprs.backward_slice(
        program.jaxpr,
        invars=[*program.jaxpr.invars, *(v for _, v in inputs)],
        outvars=[*(v for _, v in outputs), *(program.jaxpr.outvars[r] for r in results)],
    )
    live = jaxprs.read_vars(body) | held
    constants = [(i, v) for i, v in enumerate(program.constant_vars) if v in live]
    params = [(i, v) for i, v in enumerate(program.param_vars) if v in live]
    batch = [(i, v) for i, v in enumerate(program.batch_vars) if v in live]
    invars = [v for _, v in (*constants, *params, *batch, *inputs)]
    return Stage(
        forward=jaxprs.rebuild(body, invars=invars),
        constants=tuple(program.constants[i] for i, _ in constants),
        params=tuple(i for i, _ in params),
        batch=tuple(i for i, _ in batch),
        inputs=tuple(i for i, _ in inputs),
        outputs=tuple(i for i, _ in outputs),
        results=results,
    )
