"""The tensors of safetensors files (https://github.com/huggingface/safetensors)."""

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      file: where it is.
      name: what it is called there.
      dtype: as the file says it; `DTYPES` has those that can be read.
      shape: its shape.
    """

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Return its values."""
        with safe_open(self.file, "numpy") as opened:
            values: np.ndarray = opened.get_tensor(self.name)
        return values


def find_tensors(file: pathlib.Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; only its header is read.

    Raises:
      ValueError: there is no such file, it has another format, or its end is missing.
    """
    if not file.is_file():
        raise ValueError(f"the file {file} is missing")
    try:
        with safe_open(file, "numpy") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            return {
                name: Tensor(
                    file=file, name=name, dtype=it.get_dtype(), shape=tuple(it.get_shape())
                )
                for name, it in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is broken, copy it again: {error}") from error


def write_tensors(file: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file of tensors, which is a copy of them in memory until it is written."""
    save_file(dict(tensors), file, metadata={"format": "pt"})  # which transformers asks for
