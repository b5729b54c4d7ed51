"""Choose what a stage's forward saves for its backward: a minimum cut.

Cheap equations (elementwise arithmetic, changes of shape) may be run again in the backward; all
others may not. Among the sets of values from which the backward can then be computed, the one with
the fewest bytes is a minimum cut between what the forward must compute and what the gradient reads
(as in Chen et al. 2016, arXiv 1604.06174, solved as a flow). What depends only on parameters, batch
and constants by cheap equations costs nothing: those are at hand in the backward anyway.
"""

import math
from collections.abc import Container, Iterable, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from passes import jaxprs
from passes.jaxprs import JaxprEqn, Var

FORM = frozenset(
    """
    broadcast_in_dim reshape squeeze transpose slice rev iota stop_gradient copy
    optimization_barrier convert_element_type bitcast_convert_type reduce_precision
    select_n eq ne lt le gt ge and or not xor is_finite
    """.split()  # noqa: SIM905
)
"""Changes of form, and masks."""

CHEAP = FORM | frozenset(
    """
    add add_any sub mul div neg max min abs sign floor ceil round clamp square integer_pow
    one_minus_square shift_left shift_right_logical shift_right_arithmetic
    """.split()  # noqa: SIM905
)
"""Cheaper to compute again than to keep: they move bytes, or do one operation a byte moved."""

_SOURCE, _SINK = 0, 1
_UNCUTTABLE = 2**30


def choose_saved(
    known: Sequence[JaxprEqn],
    *,
    at_hand: Iterable[Var],
    given: Iterable[Var],
    wanted: set[Var],
    again: Container[str] = CHEAP,
) -> list[Var]:
    """Return the values to save so that `wanted` can be computed from them by cheap equations.

    Args:
      known: the equations that do not depend on a cotangent, in order.
      at_hand: values that the backward has anyway, at no cost; so is what is cheap from these.
      given: other values that no equation makes; they cost their bytes if the backward reads them.
      wanted: what the gradient reads.
      again: the primitives that may be run again, on values that are not at hand.

    Returns:
      The saved values, in the order in which they are made.
    """
    free = set(at_hand)
    costs: dict[Var, int] = {v: jaxprs.nbytes([v.aval]) for v in given}
    edges: list[tuple[int, int, int]] = []
    node: dict[Var, int] = {v: 2 + 2 * i for i, v in enumerate(costs)}
    edges += [(_SOURCE, node[v], _UNCUTTABLE) for v in costs]
    for eqn in known:
        sources = set(jaxprs.reads(eqn)) - free
        if eqn.primitive.name in CHEAP and not sources:
            free.update(eqn.outvars)
            continue
        for v in eqn.outvars:
            node[v] = 2 + 2 * len(node)
            costs[v] = jaxprs.nbytes([v.aval])
            if eqn.primitive.name in again:
                edges += [(node[u] + 1, node[v], _UNCUTTABLE) for u in sources]
            else:
                edges.append((_SOURCE, node[v], _UNCUTTABLE))
    # The flow works in 32-bit integers, so bytes are counted in units.
    unit = math.ceil((sum(costs.values()) + 1) / (_UNCUTTABLE // 2))
    edges += [(n, n + 1, max(1, costs[v] // unit)) for v, n in node.items()]
    edges += [(node[v] + 1, _SINK, _UNCUTTABLE) for v in wanted if v not in free]
    if not edges:
        return []
    reaches_sink = _behind_the_cut(edges, 2 + 2 * len(node))
    return [v for v, n in node.items() if n + 1 in reaches_sink and n not in reaches_sink]


def _behind_the_cut(edges: Sequence[tuple[int, int, int]], num_nodes: int) -> set[int]:
    """Return the nodes behind the minimum cut that is nearest to the sink."""
    tails, heads, capacities = np.array(edges, dtype=np.int32).T
    graph = csr_array((capacities, (tails, heads)), shape=(num_nodes, num_nodes), dtype=np.int32)
    residual = graph - maximum_flow(graph, _SOURCE, _SINK).flow
    residual.eliminate_zeros()
    order = breadth_first_order(residual.T.tocsr(), _SINK, return_predecessors=False)
    return set(order.tolist())
