"""Every model that experiments can name, with its published sizes."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from flax import linen as nn

from models import deepseek, gemma, llama2, nemotron_h
from models.hugging_face import deepseek as stored_deepseek
from models.hugging_face import gemma as stored_gemma
from models.hugging_face import llama2 as stored_llama2
from models.hugging_face import nemotron_h as stored_nemotron_h
from models.hugging_face.stored import Stored


class HuggingFace(Protocol):
    """How checkpoints of a model look: a module of `models.hugging_face`.

    MODEL_TYPES are its names in config.json; UNREAD are regular expressions of tensors that
    published checkpoints may have beside those of `stored_as`.
    """

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...

    @property
    def UNREAD(self) -> tuple[str, ...]: ...

    def read_config(self, stored: Mapping[str, Any], **types: Any) -> Any: ...

    def write_config(self, config: Any) -> dict[str, Any]: ...

    def stored_as(self, config: Any) -> dict[str, Stored]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A module class, called with a config, and the configs and the form it was published in."""

    module: type[nn.Module]
    sizes: Mapping[str, Any]
    hugging_face: HuggingFace


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "deepseek": Model(
            module=deepseek.DeepSeek, sizes=deepseek.SIZES, hugging_face=stored_deepseek
        ),
        "gemma": Model(module=gemma.Gemma, sizes=gemma.SIZES, hugging_face=stored_gemma),
        "llama2": Model(module=llama2.Llama2, sizes=llama2.SIZES, hugging_face=stored_llama2),
        "nemotron_h": Model(
            module=nemotron_h.NemotronH, sizes=nemotron_h.SIZES, hugging_face=stored_nemotron_h
        ),
    }
)
