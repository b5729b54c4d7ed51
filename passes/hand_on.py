"""Let what skips stages go through them, from each to the next.

What layers add to the loss skips the stages whose layers add nothing, and an early activation those
whose layers do not read it. If it were sent past them, devices that are no neighbours would wait
for each other. (It goes around so also where both ends are on one device, and could stay there.)
"""

import dataclasses

import jax.numpy as jnp

from passes import jaxprs
from passes.jaxprs import Var
from passes.stages import Crossing, Stage, Stages


def hand_on(stages: Stages) -> Stages:
    """Return the stages with all that skips some of them sent from each to the next."""
    crossings, changed = list(stages.crossings), list(stages.stages)
    for index, crossing in enumerate(stages.crossings):
        first, last = crossing.producer, crossing.consumers[-1]
        if last == first + 1:
            continue
        maker = stages.stages[first]
        value = maker.forward.outvars[maker.outputs.index(index)]
        assert isinstance(value, Var), "an activation is computed"
        crossings[index] = _to_next(crossing, first)
        came = index
        for s in range(first + 1, last + 1):
            changed[s] = _read(changed[s], value, index, came)
            if s < last:
                came = len(crossings)
                changed[s] = _make(changed[s], value, came)
                crossings.append(_to_next(crossing, s))
    return dataclasses.replace(stages, crossings=tuple(crossings), stages=tuple(changed))


def _to_next(crossing: Crossing, producer: int) -> Crossing:
    return dataclasses.replace(crossing, producer=producer, consumers=(producer + 1,))


def _read(stage: Stage, value: Var, index: int, came: int) -> Stage:
    """Return a stage that reads `value` from crossing `came`, and no longer from `index`."""
    if index in stage.inputs:
        inputs = tuple(came if c == index else c for c in stage.inputs)
        return dataclasses.replace(stage, inputs=inputs)
    invars = [*stage.forward.invars, value]
    return dataclasses.replace(
        stage,
        forward=jaxprs.rebuild(stage.forward, invars=invars),
        inputs=(*stage.inputs, came),
    )


def _make(stage: Stage, value: Var, goes: int) -> Stage:
    """Return a stage that makes crossing `goes`, which equals `value`."""
    eqns, equal = jaxprs.applied(lambda values: jnp.copy(values[0]), [value])
    outvars = list(stage.forward.outvars)
    outvars.insert(len(stage.outputs), equal)
    return dataclasses.replace(
        stage,
        forward=jaxprs.rebuild(stage.forward, eqns=[*stage.forward.eqns, *eqns], outvars=outvars),
        outputs=(*stage.outputs, goes),
    )
