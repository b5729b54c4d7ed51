"""By XLA's count of operations, a backward in two parts costs what it costs whole, or 3 % more."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxptis.executor.compiled import Compiler
from jaxptis.executor.programs import BatchLeaf, stage_program
from models import MODELS as OURS
from models import next_token_loss
from passes.cut_stages import cut_stages
from passes.differentiate import differentiate
from passes.split_backward import split_backward
from tests import foreign_models
from tests.passes.on_host import count_layers, layers_of, types

# Of two models that differ in how they draw their dropout one is enough.
FOREIGN = [name for name in foreign_models.MODELS if not name.endswith("_dropout_key")]

pytestmark = [
    pytest.mark.usefixtures("lenient"),
    *foreign_models.WARNINGS,
]


@functools.cache
def case(name):
    """Return the layers of a model, and the batch that they were found with."""
    if name in OURS:
        loss, params, batch = _ours(name)
    else:
        made = foreign_models.MODELS[name]()
        loss, (params, batch) = made.loss, made.draw(0)
    return layers_of(loss, params, batch), batch


def _ours(name):
    model = OURS[name]
    module = model.module(model.sizes["tiny"])
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]

    def loss(params, batch):
        return next_token_loss(functools.partial(module.apply, {"params": params}), batch)

    return loss, params, {"tokens": tokens}


def check(*, whole, input_grad, weight_grad):
    assert input_grad + weight_grad <= 1.03 * whole
    assert min(input_grad, weight_grad) > 0.25 * whole  # there is something to split


each = pytest.mark.parametrize("name", [*OURS, *FOREIGN])


@each
def test_of_all_layers(name):
    layers = count_layers(case(name)[0])
    check(
        whole=sum(layer.backward.flops for layer in layers),
        input_grad=sum(layer.input_grad.flops for layer in layers),
        weight_grad=sum(layer.weight_grad.flops for layer in layers),
    )


@each
def test_of_the_second_of_two_stages(name):
    """Compiled as the pipeline does; the first has no input gradient."""
    graph, batch = case(name)
    num_layers = len(graph.layers)
    _, last = differentiate(cut_stages(graph, [0, num_layers // 2, num_layers]))
    split = split_backward(last.backward)
    leaves = [BatchLeaf(aval=aval, axis=None, size=0) for aval in jax.tree.leaves(types(batch))]
    programs = {
        "whole": last.backward,
        "input_grad": split.input_grad,
        "weight_grad": split.weight_grad,
    }
    specs = {
        kind: stage_program(kind, program, device=0, batch=leaves)
        for kind, program in programs.items()
    }
    compiled = Compiler(jax.devices()[:1]).programs(specs, dict.fromkeys(specs, ()))
    check(**{kind: program.cost_analysis()["flops"] for kind, program in compiled.items()})
