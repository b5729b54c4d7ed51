"""Every model that experiments can name, with its published sizes."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import linen as nn

from models import deepseek, gemma, llama2, nemotron_h


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A module class, called with a config, and the configs it was published with."""

    module: type[nn.Module]
    sizes: Mapping[str, Any]


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "deepseek": Model(module=deepseek.DeepSeek, sizes=deepseek.SIZES),
        "gemma": Model(module=gemma.Gemma, sizes=gemma.SIZES),
        "llama2": Model(module=llama2.Llama2, sizes=llama2.SIZES),
        "nemotron_h": Model(module=nemotron_h.NemotronH, sizes=nemotron_h.SIZES),
    }
)
