"""Let scalars go from stage to stage, beside the activations.

What layers add to the loss skips the stages whose layers add nothing. If it were sent past them,
devices that are no neighbours would wait for each other, for a few bytes.
"""

import dataclasses

import jax.numpy as jnp

from passes import jaxprs
from passes.jaxprs import Var
from passes.stages import Crossing, Stage, Stages


def hand_on(stages: Stages) -> Stages:
    """Return the stages with every scalar that skips some of them sent from each to the next."""
    crossings, changed = list(stages.crossings), list(stages.stages)
    for index, crossing in enumerate(stages.crossings):
        first, last = crossing.producer, crossing.consumers[-1]
        if crossing.aval.shape or last == first + 1:
            continue
        maker = stages.stages[first]
        scalar = maker.forward.outvars[maker.outputs.index(index)]
        assert isinstance(scalar, Var), "an activation is computed"
        crossings[index] = _to_next(crossing, first)
        came = index
        for s in range(first + 1, last + 1):
            changed[s] = _read(changed[s], scalar, index, came)
            if s < last:
                came = len(crossings)
                changed[s] = _make(changed[s], scalar, came)
                crossings.append(_to_next(crossing, s))
    return dataclasses.replace(stages, crossings=tuple(crossings), stages=tuple(changed))


def _to_next(crossing: Crossing, producer: int) -> Crossing:
    return dataclasses.replace(crossing, producer=producer, consumers=(producer + 1,))


def _read(stage: Stage, scalar: Var, index: int, came: int) -> Stage:
    """Return a stage that reads `scalar` from crossing `came`, and no longer from `index`."""
    if index in stage.inputs:
        inputs = tuple(came if c == index else c for c in stage.inputs)
        return dataclasses.replace(stage, inputs=inputs)
    invars = [*stage.forward.invars, scalar]
    return dataclasses.replace(
        stage,
        forward=jaxprs.rebuild(stage.forward, invars=invars),
        inputs=(*stage.inputs, came),
    )


def _make(stage: Stage, scalar: Var, goes: int) -> Stage:
    """Return a stage that makes crossing `goes`, which equals `scalar`."""
    eqns, equal = jaxprs.applied(lambda scalars: jnp.copy(scalars[0]), [scalar])
    outvars = list(stage.forward.outvars)
    outvars.insert(len(stage.outputs), equal)
    return dataclasses.replace(
        stage,
        forward=jaxprs.rebuild(stage.forward, eqns=[*stage.forward.eqns, *eqns], outvars=outvars),
        outputs=(*stage.outputs, goes),
    )
