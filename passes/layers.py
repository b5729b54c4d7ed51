"""Find the layers of a model: they lie between the places where its dataflow narrows.

Every value of the program is one of three kinds: it depends on parameters only, on the batch (or on
constants) only, or on both. Those that depend on both are the activations, and only they ever
cross from one stage to the next: the other two are computed again where they are read. Walking the
equations that make activations, in order, and adding up the bytes of the live ones, the sum falls
to a narrow waist between blocks: the residual stream. A layer is what lies between two waists and
reads a parameter in something heavier than elementwise arithmetic. Names play no part: they only
label.
"""

import collections
import dataclasses
import enum
import itertools
from collections.abc import Iterator, Sequence

from passes import jaxprs
from passes.jaxprs import JaxprEqn, Var
from passes.program import Program

# Reading a parameter in one of these (a bias, the scale of a norm) does not make a layer.
_LIGHT = frozenset(
    """
    add add_any sub mul div max min pow neg select_n convert_element_type broadcast_in_dim
    reshape squeeze expand_dims transpose concatenate
    """.split()  # noqa: SIM905
)


class Origin(enum.Flag):
    """What a value is computed from."""

    NOTHING = 0
    PARAMS = enum.auto()
    BATCH = enum.auto()


ACTIVATION = Origin.PARAMS | Origin.BATCH


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
        names = [layer.name for layer in self.layers]
        assert len(set(names)) == len(names), names

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

    Raises:
      ValueError: no value depends on both the parameters and the batch.
    """
    origins = find_origins(program)
    eqns = program.jaxpr.eqns
    activations = tuple(i for i, e in enumerate(eqns) if _origin(e, origins) == ACTIVATION)
    if not activations:
        raise ValueError("the loss does not depend on both the parameters and the batch")
    body = [eqns[i] for i in activations]
    heavy = [
        i
        for i, eqn in enumerate(body)
        if eqn.primitive.name not in _LIGHT
        and any(origins[v] == Origin.PARAMS for v in jaxprs.reads(eqn))
    ]
    waists = _waists(body, origins, heavy)
    cuts = [_best_cut(gap) for gap in _gaps(waists, heavy) if gap]
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


def find_origins(program: Program) -> dict[Var, Origin]:
    """Return what each value of the program is computed from."""
    origins = dict.fromkeys(program.constant_vars, Origin.BATCH)
    origins.update(dict.fromkeys(program.batch_vars, Origin.BATCH))
    origins.update(dict.fromkeys(program.param_vars, Origin.PARAMS))
    for eqn in program.jaxpr.eqns:
        origins.update(dict.fromkeys(eqn.outvars, _origin(eqn, origins)))
    return origins


def _origin(eqn: JaxprEqn, origins: dict[Var, Origin]) -> Origin:
    origin = Origin.NOTHING
    for v in jaxprs.reads(eqn):
        origin |= origins[v]
    return origin


@dataclasses.dataclass(frozen=True)
class _Waist:
    position: int  # between equations position - 1 and position
    live_bytes: int


def _waists(
    body: Sequence[JaxprEqn], origins: dict[Var, Origin], heavy: Sequence[int]
) -> list[_Waist]:
    """Return the positions where the dataflow is narrow.

    It is narrow where a single activation is live. It is also narrow, with several live (an
    auxiliary loss that is carried along, an encoder's output), where on both sides the live bytes
    triple before they fall lower: within a block, where queries, keys and values stand
    beside the residual stream, they do not.
    """
    lives = list(_live_activations(body, origins))
    level = [jaxprs.nbytes(v.aval for v in live) for live in lives]
    # While an equation runs, its inputs and its outputs are both live.
    during = [
        jaxprs.nbytes(v.aval for v in {*before, *eqn.outvars, *after})
        for eqn, before, after in zip(body, [set(), *lives], lives, strict=False)
    ]
    between = range(heavy[0] + 1, heavy[-1] + 1) if heavy else range(0)
    found = []
    for p in between:
        here = level[p - 1]
        peak = min(
            _peak(here, during[p - 1 :: -1], level[p - 2 :: -1] if p > 1 else []),
            _peak(here, during[p:], level[p:]),
        )
        if len(lives[p - 1]) == 1 or peak >= 3 * here:
            found.append(_Waist(p, here))
    return found


def _live_activations(body: Sequence[JaxprEqn], origins: dict[Var, Origin]) -> Iterator[set[Var]]:
    """Yield the activations that are live after each equation."""
    last_read: dict[Var, int] = {}
    for i, eqn in enumerate(body):
        last_read.update((v, i) for v in jaxprs.reads(eqn) if origins[v] == ACTIVATION)
    live: set[Var] = set()
    for i, eqn in enumerate(body):
        live |= {v for v in eqn.outvars if last_read.get(v, -1) > i}
        live -= {v for v in jaxprs.reads(eqn) if last_read.get(v) == i}
        yield set(live)


def _peak(here: int, during: Sequence[int], level: Sequence[int]) -> float:
    """Return the most bytes live before the level falls below `here`; the end is a wall."""
    peak = 0
    for high, low in zip(during, level, strict=False):
        peak = max(peak, high)
        if low < here:
            return peak
    return float("inf")


def _gaps(waists: Sequence[_Waist], heavy: Sequence[int]) -> Iterator[list[_Waist]]:
    """Yield, for each two neighbouring heavy equations, the waists between them."""
    for a, b in itertools.pairwise(heavy):
        yield [w for w in waists if a < w.position <= b]


def _best_cut(gap: Sequence[_Waist]) -> int:
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
    """Return, for each value, the parameters it is computed from without the batch."""
    behind: dict[Var, frozenset[int]] = collections.defaultdict(frozenset)
    behind.update((v, frozenset([i])) for i, v in enumerate(program.param_vars))
    for eqn in program.jaxpr.eqns:
        if _origin(eqn, origins) == Origin.PARAMS:
            params = frozenset().union(*(behind[v] for v in jaxprs.reads(eqn)))
            behind.update((v, params) for v in eqn.outvars)
    return behind


def _labels(program: Program, reads: Sequence[tuple[int, ...]]) -> list[str]:
    """Name each layer after what its large parameters have in common."""
    sizes = [jaxprs.nbytes([v.aval]) for v in program.param_vars]
    paths = [source.path.split("/") for source in program.sources]
    labels: list[str] = []
    for read in reads:
        largest = max((sizes[p] for p in read), default=0)
        large = [p for p in read if sizes[p] * 10 >= largest]
        main = [paths[p][:-1] or paths[p] for p in large]
        indices = {program.sources[p].index for p in large}
        ends = ["/".join(path) for path in (*main[:1], *main[-1:])]
        label = "/".join(_common_prefix(main)) or "..".join(ends) or "layer"
        label += indices.pop() if len(indices) == 1 else ""
        numbered = (f"{label}#{n}" for n in itertools.count(2))
        labels.append(next(x for x in itertools.chain([label], numbered) if x not in labels))
    return labels


def _common_prefix(paths: Sequence[Sequence[str]]) -> list[str]:
    prefix = []
    for keys in zip(*paths, strict=False):
        if len(set(keys)) > 1:
            break
        prefix.append(keys[0])
    return prefix
