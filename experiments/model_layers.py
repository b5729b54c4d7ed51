"""The loss and the layers of a model, of any size: nothing of it is allocated."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models import Model
from passes import PROGRAM_PASSES
from passes.layers import LayerGraph, find_layers
from passes.runner import Dump, run
from passes.trace import trace


def loss_of(
    model: Model, config: Any, *, batch_size: int, sequence_length: int
) -> tuple[Callable[..., Any], Any, Any]:
    """Returns the loss, with what is logged beside it, and the types of parameters and batch.

    Args:
        model: the family.
        config: which of the family.
        batch_size: sequences.
        sequence_length: tokens predicted in each.
    """
    module, loss = model.module(config), model.loss(config)
    apply: Callable[..., Any] = module.apply

    def loss_fn(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return loss(functools.partial(apply, {"params": params}), batch)

    tokens = jax.ShapeDtypeStruct((batch_size, sequence_length + 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    return loss_fn, params, {"tokens": tokens}


def layers_of(
    model: Model,
    config: Any,
    *,
    microbatch_size: int,
    sequence_length: int,
    head_slices: int = 1,
) -> tuple[LayerGraph, Any]:
    """Returns the layers of a microbatch's loss, and the types of the parameters.

    Args:
        model: the family.
        config: which of the family.
        microbatch_size: sequences.
        sequence_length: tokens predicted in each.
        head_slices: parts of the vocabulary into which the head is cut.
    """
    loss_fn, params, batch = loss_of(
        model, config, batch_size=microbatch_size, sequence_length=sequence_length
    )
    program, _ = trace(loss_fn, params, batch, has_aux=True)
    program = dataclasses.replace(program, head_slices=head_slices)
    return find_layers(run(program, PROGRAM_PASSES, Dump(None))), params
