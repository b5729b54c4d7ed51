"""Small models that nobody here wrote, as their packages build them, and losses that call them.

`MODELS` maps a name to a function that builds a `ForeignModel`; its docstring says what the model
asks for that others do not.
"""

import pytest

from tests.foreign_models import flax_examples, transformers_models, tunix_models

MODELS = {
    make.__name__: make
    for make in (
        transformers_models.llama,
        transformers_models.gemma,
        transformers_models.roberta_remat,
        transformers_models.gpt2,
        transformers_models.gpt2_dropout_keys,
        transformers_models.gpt2_dropout_key,
        transformers_models.t5,
        transformers_models.t5_remat,
        transformers_models.bart,
        tunix_models.qwen3_moe,
        tunix_models.llama3_remat,
        tunix_models.gemma2,
        tunix_models.gemma3,
        tunix_models.gemma4,
        flax_examples.lm1b,
    )
}

# What tunix 0.1.7 still uses of jax and flax.
WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{each}")
    for each in (
        "jax.experimental.shard_map is deprecated",
        "jax.interpreters.pxla.thread_resources is deprecated",
        "'sharding' is deprecated, use 'out_sharding'",
        "'.value' access is now deprecated",
    )
]
