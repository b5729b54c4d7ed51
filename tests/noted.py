"""A leaf of a pytree that is no array yet, and takes note of when it becomes one."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Noted:
    """Writes its name to `seen` every time that its values are read."""

    leaf: Any
    name: str
    seen: list[str]

    @property
    def shape(self):
        return self.leaf.shape

    @property
    def dtype(self):
        return self.leaf.dtype

    def __array__(self, dtype=None, copy=None):
        self.seen.append(self.name)
        return np.asarray(self.leaf, dtype)
