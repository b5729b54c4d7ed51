"""Makes the first state, each part of it on its own devices."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxptis.executor.compiled import Compiler
from jaxptis.executor.draft import Copies, Draft, Homes
from jaxptis.executor.executable import Executable
from passes import jaxprs
from passes.boxes import Pieces, whole
from passes.split_update import split_by_device
from passes.split_values import split_values, unroll_split_scans


def initializer(
    compiler: Compiler,
    fun: Callable[..., Any],
    args: Sequence[Any],
    homes: Sequence[Homes],
    *,
    given: Sequence[Pieces],
    wanted: Sequence[Pieces],
) -> tuple[Executable, tuple[Homes, ...]]:
    """Return a program that makes each part of `fun(*args)`, an array of its own, on its devices.

    Args:
      compiler: for the devices.
      fun: returns a pytree.
      args: pytrees of types.
      homes: where each part is wanted.
      given: the pieces of each leaf of `args`.
      wanted: the pieces of each leaf of the result.

    Returns:
      The program, which takes the parts of `args` on the devices that need them, and for each
      part these devices.
    """
    jaxpr, closed_over, _ = jaxprs.trace(fun, *args)
    jaxpr, inlined = jaxprs.inline(jaxpr, also_rules=True)
    jaxpr, unrolled = unroll_split_scans(jaxprs.drop_dead_equations(jaxpr), wanted)
    constants = [*unrolled, *inlined, *closed_over]
    fixed = [(whole(aval.shape),) for aval in jaxprs.avals(jaxpr.invars[: len(constants)])]
    jaxpr = split_values(jaxpr, inputs=[*fixed, *given], outputs=wanted).jaxpr
    jaxpr = jaxprs.with_own_outputs(jaxprs.drop_dead_equations(jaxpr), also_inputs=True)
    avals = jaxprs.avals(jaxpr.invars[len(constants) :])
    split = split_by_device(jaxpr, input_homes=[None] * len(jaxpr.invars), output_homes=list(homes))
    names = [
        *(f"init.constant{k}" for k in range(len(constants))),
        *(f"argument{i}" for i in range(len(avals))),
    ]
    draft = Draft(len(compiler.devices))
    draft.constants_of_split(split, names, constants)
    needed = Copies(
        homes=tuple(place.homes for place in split.inputs[len(constants) :]),
        prefix="argument",
        avals=tuple(avals),
    )
    draft.inputs = needed.buffers()
    placed = draft.split(split, "init", names)
    outputs = [(device, buffer) for buffer, at in placed for device in at]
    return draft.executable(compiler, "making a state", outputs), needed.homes
