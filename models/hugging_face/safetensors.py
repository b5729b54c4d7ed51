"""Safetensors files, read and written a tensor at a time, which is then all that is in memory.

A file is the length of a header in 8 bytes, the header in JSON, and the bytes of the tensors
(https://github.com/huggingface/safetensors, section "Format").
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      file: where it is.
      start: its first byte there.
      stop: the byte behind its last.
      dtype: as the file says it; `DTYPES` has those that can be read.
      shape: its shape.
    """

    file: pathlib.Path
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Return its values."""
        data = np.fromfile(self.file, np.uint8, self.stop - self.start, offset=self.start)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)


def find_tensors(file: pathlib.Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; only its header is read.

    Raises:
      ValueError: there is no such file, it has another format, or its end is missing.
    """
    if not file.is_file():
        raise ValueError(f"the file {file} is missing")
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        first, size = 8 + length, file.stat().st_size
        try:
            header = json.loads(opened.read(length) if first <= size else b"")
            header.pop("__metadata__", None)
            tensors = {
                name: Tensor(
                    file=file,
                    start=first + entry["data_offsets"][0],
                    stop=first + entry["data_offsets"][1],
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                )
                for name, entry in header.items()
            }
        except (AttributeError, LookupError, TypeError, ValueError):
            raise ValueError(f"{file} does not begin as a safetensors file does") from None
    end = max((tensor.stop for tensor in tensors.values()), default=first)
    if size != end:
        raise ValueError(f"{file} has {size} bytes, but its header speaks of {end}; copy it again")
    return tensors


def write_tensors(
    file: pathlib.Path,
    types: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[np.ndarray],
) -> None:
    """Write a file of tensors of these types, in their order; each is asked for after the last."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    stop = 0
    for name, each in types.items():
        start, stop = stop, stop + nbytes(each)
        header[name] = {
            "dtype": names[np.dtype(each.dtype)],
            "shape": each.shape,
            "data_offsets": (start, stop),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.writelines(map(_bytes, tensors))  # which holds none while it asks for the next


def _bytes(tensor: np.ndarray) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def nbytes(each: jax.ShapeDtypeStruct) -> int:
    """Return the bytes of a tensor of this type."""
    return math.prod(each.shape) * np.dtype(each.dtype).itemsize
