"""The head of a language model. Shapes: D model width, V vocabulary."""

from typing import Protocol

import jax
from flax import linen as nn

from models.parts.dense import Types


class HeadConfig(Types, Protocol):
    """The two sides of the kernel."""

    @property
    def model_width(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class Head(nn.Module):
    """Holds the kernel (D, V) that maps the residual stream to logits."""

    config: HeadConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        shape = (c.model_width, c.vocab_size)
        return self.param("kernel", nn.initializers.lecun_normal(), shape, c.param_dtype)
