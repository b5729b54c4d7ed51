"""How a parameter of ours is stored in a Hugging Face checkpoint."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a parameter is in a checkpoint.

    Attributes:
      names: of the tensors; several are stacked along the first axis of the parameter (experts).
      num_inputs: how many axes of a kernel (of one expert) are contracted, the first ones; it is
        stored as a matrix (outputs, inputs). None: stored as it is.
      copies: names under which the first tensor is written again, and that need not be read.
    """

    names: tuple[str, ...]
    num_inputs: int | None = None
    copies: tuple[str, ...] = ()

    def read(
        self, tensors: Iterable[np.ndarray], shape: tuple[int, ...], dtype: DTypeLike
    ) -> np.ndarray:
        """Return the parameter from the tensors of these names, each asked for after the last."""
        parameter = np.empty(shape, dtype)
        for part, tensor in zip(self.write(parameter), tensors, strict=True):
            part[...] = tensor
        return parameter

    def write(self, parameter: np.ndarray) -> list[np.ndarray]:
        """Return the tensors of these names, as views of the parameter."""
        wanted = self.stored_shape(parameter.shape)
        parts = parameter.reshape(len(self.names), *(wanted[::-1] if self.num_inputs else wanted))
        return [part.T if self.num_inputs else part for part in parts]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each tensor of a parameter of this shape."""
        own = shape[1:] if len(self.names) > 1 else shape
        if self.num_inputs is None:
            return own
        return math.prod(own[self.num_inputs :]), math.prod(own[: self.num_inputs])


def kernel(*names: str, num_inputs: int = 1, copies: tuple[str, ...] = ()) -> Stored:
    """Return how a kernel is stored, or one of several experts, by the names of the layers."""
    return Stored(names=_weights(names), num_inputs=num_inputs, copies=_weights(copies))


def plain(name: str, copies: tuple[str, ...] = ()) -> Stored:
    """Return how the scale of a norm is stored, or an embedding, by the name of the layer."""
    return Stored(names=_weights([name]), copies=_weights(copies))


def attention(ours: str, theirs: str) -> dict[str, Stored]:
    """Return where the kernels of an attention are, by their paths."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    found = {f"{ours}/{our}/kernel": kernel(f"{theirs}.{their}") for our, their in names.items()}
    return found | {f"{ours}/out/kernel": kernel(f"{theirs}.o_proj", num_inputs=2)}


def gated_mlp(ours: str, theirs: str) -> dict[str, Stored]:
    """Return where the kernels of an MLP with a gate are, by their paths."""
    return {
        f"{ours}/{part}/kernel": kernel(f"{theirs}.{part}_proj") for part in ("gate", "up", "down")
    }


def _weights(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in names)
