"""Every model that experiments can name, with its published sizes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import optax
from flax import linen as nn

from models import deepseek, gemma, llama2, nemotron_h
from models.hugging_face import deepseek as stored_deepseek
from models.hugging_face import gemma as stored_gemma
from models.hugging_face import llama2 as stored_llama2
from models.hugging_face import nemotron_h as stored_nemotron_h
from models.hugging_face.stored import Stored
from models.loss import next_token_loss
from models.parts.moe import steer_biases

# Maps a model with its parameters bound, and a batch, to what is minimized and to next_token_loss.
Loss = Callable[[Callable[..., Any], Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]]


def _plain_loss(config: Any) -> Loss:
    def loss(
        model: Callable[..., Any], batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        value = next_token_loss(model, batch)
        return value, value

    return loss


def _deepseek_loss(config: deepseek.DeepSeekConfig) -> Loss:
    return functools.partial(
        deepseek.training_loss,
        balance_weight=1e-4 if config.scoring == "sigmoid" else 1e-3,
        after_next_weight=0.3 if config.after_next else 0.0,
    )


class HuggingFace(Protocol):
    """How checkpoints of a model look: a module of `models.hugging_face`.

    MODEL_TYPES are its names in config.json. Tensors may have PREFIX before their names. UNREAD are
    regular expressions of those that published checkpoints may have beside those of `stored_as`.
    ADVICE is what helps, by regular expressions of what can be wrong with the tensors.
    """

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...

    @property
    def PREFIX(self) -> str: ...

    @property
    def UNREAD(self) -> tuple[str, ...]: ...

    @property
    def ADVICE(self) -> Mapping[str, str]: ...

    def read_config(self, stored: Mapping[str, Any], **types: Any) -> Any: ...

    def write_config(self, config: Any) -> dict[str, Any]: ...

    def stored_as(self, config: Any) -> dict[str, Stored]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """How to build and train a family.

    Attributes:
      module: called with a config.
      sizes: the configs it was published with, by name.
      hugging_face: the form it was published in.
      loss: maps a config to what it was trained on.
      steer: maps an optimizer to one that also takes the steps that have no gradient.
    """

    module: type[nn.Module]
    sizes: Mapping[str, Any]
    hugging_face: HuggingFace
    loss: Callable[[Any], Loss] = _plain_loss
    steer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda it: it


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "deepseek": Model(
            module=deepseek.DeepSeek,
            sizes=deepseek.SIZES,
            hugging_face=stored_deepseek,
            loss=_deepseek_loss,
            steer=steer_biases,
        ),
        "gemma": Model(module=gemma.Gemma, sizes=gemma.SIZES, hugging_face=stored_gemma),
        "llama2": Model(module=llama2.Llama2, sizes=llama2.SIZES, hugging_face=stored_llama2),
        "nemotron_h": Model(
            module=nemotron_h.NemotronH, sizes=nemotron_h.SIZES, hugging_face=stored_nemotron_h
        ),
    }
)
