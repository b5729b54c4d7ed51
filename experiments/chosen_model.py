"""The flags that name a model and its size."""

from typing import Any

from absl import flags

from models import MODELS

SIZES = sorted({size for model in MODELS.values() for size in model.sizes})

MODEL = flags.DEFINE_enum("model", "llama2", sorted(MODELS), "Which model.")
SIZE = flags.DEFINE_enum("size", "tiny", SIZES, "Which of its sizes.")


@flags.multi_flags_validator(["model", "size"])
def _has_size(values: dict[str, Any]) -> bool:
    sizes = MODELS[values["model"]].sizes
    if values["size"] not in sizes:
        raise flags.ValidationError(f"the model has no such size; use {', '.join(sizes)}")
    return True
