"""Find the layers of a model: they lie between the places where its dataflow narrows.

What depends, beside constants, on parameters only, on the batch only, or is a light combination of
the two, is computed again where it is read. All else are the activations, and only they ever cross
from one stage to the next. Walking the equations that make activations, in order, and adding up the
bytes of the live ones, the sum falls to a narrow waist between blocks: the residual stream. A layer
is what lies between two waists and reads a parameter in something heavier than elementwise
arithmetic. Names play no part: they only label.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from passes import jaxprs
from passes.jaxprs import JaxprEqn, Var
from passes.join_params import join_params
from passes.origins import BOTH, Origin, find_origins
from passes.program import Program
from passes.waists import Dataflow, Waist


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A run of the equations that make activations.

    Attributes:
      name: from the paths of the parameters it reads; unique among the layers.
      start: index of the first equation, among those that make activations.
      stop: one past the last.
      params: indices of the parameters it reads.
    """

    name: str
    start: int
    stop: int
    params: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGraph:
    """A program and its layers, in order.

    Attributes:
      program: the whole model.
      activations: indices, among all equations, of those that make activations.
      layers: they cover the activations without a gap.
    """

    program: Program
    activations: tuple[int, ...]
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise unless the layers cover the activations in order and have unique names."""
        edges = [layer.start for layer in self.layers] + [len(self.activations)]
        assert edges[0] == 0 and edges == sorted(edges), edges
        assert all(a.stop == b for a, b in zip(self.layers, edges[1:], strict=True)), edges
        assert len(set(self.names)) == len(self.names), self.names

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the layers, in order."""
        return tuple(layer.name for layer in self.layers)

    def text(self) -> str:
        """Return the layers, a line each: name, number of equations, parameters."""
        paths = self.program.params
        return "".join(
            f"{layer.name}: {layer.stop - layer.start} equations, reads "
            f"{', '.join(paths[p] for p in layer.params) or 'no parameter'}\n"
            for layer in self.layers
        )


def find_layers(program: Program) -> LayerGraph:
    """Cut a program at its narrow waists.

    A leaf of the parameters is whole again if one layer reads all its slices.

    Raises:
      ValueError: no value depends on both the parameters and the batch.
    """
    graph = _cut(program)
    joined = join_params(program, [layer.params for layer in graph.layers])
    return graph if joined is program else _cut(joined)


def _cut(program: Program) -> LayerGraph:
    origins = find_origins(program)
    eqns = program.jaxpr.eqns
    # A loss that is light all through has no activations; then it is one layer.
    activations = _made_of(Origin.ACTIVATION, eqns, origins) or _made_of(BOTH, eqns, origins)
    if not activations:
        raise ValueError("the loss does not depend on both the parameters and the batch")
    body = [eqns[i] for i in activations]
    flow = Dataflow(body, origins)
    cuts = [_best_cut(gap) for gap in _gaps(flow.waists(), body, flow.heavy) if gap]
    edges = [0, *cuts, len(body)]
    params = _params_behind(program, origins)
    reads = [
        tuple(sorted({p for eqn in body[a:b] for v in jaxprs.reads(eqn) for p in params[v]}))
        for a, b in itertools.pairwise(edges)
    ]
    names = _labels(program, reads)
    layers = tuple(
        Layer(name=name, start=a, stop=b, params=read)
        for name, (a, b), read in zip(names, itertools.pairwise(edges), reads, strict=True)
    )
    return LayerGraph(program=program, activations=activations, layers=layers)


def _made_of(
    origin: Origin, eqns: Sequence[JaxprEqn], origins: dict[Var, Origin]
) -> tuple[int, ...]:
    """Return the indices of the equations that make values of this origin."""
    return tuple(i for i, e in enumerate(eqns) if any(origin in origins[v] for v in e.outvars))


def _gaps(
    waists: Sequence[Waist], body: Sequence[JaxprEqn], heavy: Sequence[int]
) -> Iterator[list[Waist]]:
    """Yield, for each two neighbouring heavy equations, the waists between them.

    Two lookups in a row (of tokens, of their positions) belong together.
    """
    for a, b in itertools.pairwise(heavy):
        if not body[a].primitive.name == body[b].primitive.name == "gather":
            yield [w for w in waists if a < w.position <= b]


def _best_cut(gap: Sequence[Waist]) -> int:
    """Return the narrowest waist; of equals the end of the first straight run.

    A bias and an activation function then stay with the matmul before them, and a norm goes with
    the matmul behind it.
    """
    least = min(w.live_bytes for w in gap)
    run = [w.position for w in gap if w.live_bytes == least]
    end = run[0]
    for position in run[1:]:
        if position != end + 1:
            break
        end = position
    return end


def _params_behind(program: Program, origins: dict[Var, Origin]) -> dict[Var, frozenset[int]]:
    """Return, for each value but activations, the parameters that it is computed from."""
    behind: dict[Var, frozenset[int]] = collections.defaultdict(frozenset)
    behind.update((v, frozenset([i])) for i, v in enumerate(program.param_vars))
    for eqn in program.jaxpr.eqns:
        params = frozenset().union(*(behind[v] for v in jaxprs.reads(eqn)))
        behind.update((v, params) for v in eqn.outvars if Origin.ACTIVATION not in origins[v])
    return behind


def _labels(program: Program, reads: Sequence[tuple[int, ...]]) -> list[str]:
    """Name each layer after what its large parameters have in common."""
    sizes = [jaxprs.nbytes([v.aval]) for v in program.param_vars]
    paths = [source.path.split("/") for source in program.sources]
    labels: list[str] = []
    for read in reads:
        largest = max((sizes[p] for p in read), default=0)
        large = [p for p in read if sizes[p] * 10 >= largest]
        large.sort(key=lambda p: _by_number(program.sources[p].path))
        main = [paths[p][:-1] or paths[p] for p in large]
        indices = {program.sources[p].index for p in large}
        ends = ["/".join(path) for path in (*main[:1], *main[-1:])]
        label = "/".join(_common_prefix(main)) or "..".join(ends) or "layer"
        label += indices.pop() if len(indices) == 1 else ""
        numbered = (f"{label}#{n}" for n in itertools.count(2))
        labels.append(next(x for x in itertools.chain([label], numbered) if x not in labels))
    return labels


def _by_number(path: str) -> list[str | int]:
    """Return what paths are sorted by: `Dense_9` is before `Dense_10`."""
    return [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", path)]


def _common_prefix(paths: Sequence[Sequence[str]]) -> list[str]:
    prefix = []
    for keys in zip(*paths, strict=False):
        if len(set(keys)) > 1:
            break
        prefix.append(keys[0])
    return prefix
