"""How many bytes of an optimizer's state belong to each parameter."""

import math
from collections import defaultdict
from typing import Any

import jax
import optax

from passes import jaxprs
from passes.program import Program
from passes.trace import paths


def optimizer_state_bytes(
    program: Program, params: Any, optimizer: optax.GradientTransformation
) -> dict[int, int]:
    """Return the bytes of state of each parameter of a program; nothing is allocated.

    A leaf of the state whose path ends with that of a leaf of the parameters belongs to it, as
    moments do; parts of such a leaf share it by their sizes. All other state, such as a count of
    steps, is shared by all parameters in the same way, rounded down.

    Args:
        program: whose parameters are meant.
        params: the same parameters, as the pytree of types that the optimizer is given.
        optimizer: its `init` is traced.
    """
    state = jax.eval_shape(optimizer.init, params)
    leaf_of = {path: leaf for leaf, path in enumerate(paths(params))}
    owned: dict[int | None, int] = defaultdict(int)
    for path, aval in zip(paths(state), jax.tree.leaves(state), strict=True):
        owned[_owner(path, leaf_of)] += jaxprs.nbytes([aval])
    sizes = [math.prod(jaxprs.shape_of(v)) for v in program.param_vars]
    return {
        p: owned[source.leaf] * size // max(1, math.prod(source.shape))
        + owned[None] * size // max(1, sum(sizes))
        for p, (source, size) in enumerate(zip(program.sources, sizes, strict=True))
    }


def _owner(path: str, leaf_of: dict[str, int]) -> int | None:
    """Return the parameter with the longest path that `path` ends with."""
    keys = path.split("/")
    ends = ("/".join(keys[start:]) for start in range(len(keys) + 1))
    return next((leaf_of[end] for end in ends if end in leaf_of), None)
