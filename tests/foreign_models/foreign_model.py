"""What is known of a foreign model without looking at jaxptis."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

# B: batch, T: time, D: width, V: vocabulary.
B, T, D, V = 8, 8, 32, 64
MLP_WIDTH = 48
NUM_BLOCKS = 2
NUM_HEADS, NUM_KV_HEADS, HEAD_WIDTH = 4, 2, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model, and what is known of it without looking at jaxptis.

    Attributes:
      loss: maps parameters and a batch to the mean over examples and positions.
      params: as the package draws them.
      layers: what its layers are called: what is before the blocks, the one or two of each block
        (three in a decoder that attends to an encoder), the head.
      tied: path of the embedding, if it is also the head.
      passing: what passes by other layers: the one that makes it, those that read it, its shape.
      without_gradient: ends of the paths of parameters on which the loss does not depend.
      dropout: the batch's dropout keys, as leaves beside its tokens.
      batch_axes: as `jaxptis.pipeline` takes it.
      structure: the graph of an nnx model, whose state `params` is.
      module_loss: maps this nnx model and a batch to the loss.
    """

    loss: Callable[[Any, Any], Any]
    params: Any
    layers: tuple[str, ...]
    tied: str | None = None
    passing: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()
    without_gradient: tuple[str, ...] = ()
    dropout: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    batch_axes: Any = 0
    structure: Any = None
    module_loss: Callable[[nnx.Module, Any], Any] | None = None

    def draw(self, seed):
        """Return parameters, each number of which is perturbed, and a batch.

        Several packages start scales or biases at zero, which would hide errors of what they scale.
        """
        random = np.random.default_rng(seed)

        def perturb(leaf):
            assert leaf.dtype == np.float32
            return np.asarray(leaf) + 0.1 * random.standard_normal(leaf.shape, np.float32)

        batch = {"ids": random.integers(0, V, size=(B, T), dtype=np.int32)}
        for name, shape in self.dropout.items():
            batch[name] = random.integers(0, 2**32, size=shape, dtype=np.uint32)
        return jax.tree.map(perturb, self.params), batch


def cross_entropy(logits_BTV, ids_BT):
    """The mean, over all tokens but the first, of minus the log of the probability of each."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs_BTV, ids_BT[:, 1:, None], axis=-1))


def package(name):
    """Import a module of the extra 'foreign', or skip the test."""
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} is in the extra 'foreign'")


def layers(*parts):
    """Return the names of layers: a tuple stands for those of a block, with {} for its index."""
    blocks = [
        [name.format(i) for i in range(NUM_BLOCKS) for name in part]
        if isinstance(part, tuple)
        else [part]
        for part in parts
    ]
    return tuple(functools.reduce(operator.add, blocks))
