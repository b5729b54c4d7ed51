"""Small models that are as uneven as published ones: their head has that share of the work."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from models import MODELS

HEADS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "deepseek": ("V3", 512),
        "gemma": ("2B", 4096),
        "llama2": ("7B", 512),
        "nemotron_h": ("8B", 2048),
    }
)
"""By family: a published size, and the vocabulary that gives the small one such a head."""


def uneven_config(name: str) -> Any:
    """Returns the small size of a family, with that vocabulary."""
    _, vocab_size = HEADS[name]
    return dataclasses.replace(MODELS[name].sizes["small"], vocab_size=vocab_size)
