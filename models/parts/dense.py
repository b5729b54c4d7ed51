"""Matmuls with parameters of one type that compute in another."""

from typing import Protocol

from flax import linen as nn
from jax.typing import DTypeLike


class Types(Protocol):
    """What every config says: computes in dtype, stores parameters in param_dtype."""

    @property
    def dtype(self) -> DTypeLike: ...

    @property
    def param_dtype(self) -> DTypeLike: ...


def dense(
    config: Types,
    name: str,
    features: int | tuple[int, ...],
    axis: int | tuple[int, ...] = -1,
) -> nn.DenseGeneral:
    """A matmul from the given axes to the given features, without a bias."""
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )
