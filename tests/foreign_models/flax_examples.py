"""Models of the examples in flax's source distribution, in linen."""

import pathlib
import sys
import tarfile
import types

import flax
import jax
import jax.numpy as jnp
import pytest

from tests.foreign_models.foreign_model import (
    MLP_WIDTH,
    NUM_BLOCKS,
    NUM_HEADS,
    D,
    ForeignModel,
    T,
    V,
    cross_entropy,
    layers,
)


def lm1b():
    """Parameters are boxes that name axes; closed-over sines are added to the embedding."""
    example = _example("lm1b/models.py")
    model = example.TransformerLM(
        example.TransformerConfig(
            vocab_size=V,
            output_vocab_size=V,
            logits_via_embedding=True,
            emb_dim=D,
            num_heads=NUM_HEADS,
            num_layers=NUM_BLOCKS,
            qkv_dim=D,
            mlp_dim=MLP_WIDTH,
            max_len=T,
            deterministic=True,
        )
    )
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, T), jnp.int32))["params"])
    block = "decoder/encoderdecoderblock_{}"
    return ForeignModel(
        loss=lambda params, batch: cross_entropy(
            model.apply({"params": params}, batch["ids"]), batch["ids"]
        ),
        params=init(jax.random.key(0)),
        layers=layers(
            "decoder/Embed_0/embedding",
            (f"{block}/MultiHeadDotProductAttention_0", f"{block}/MlpBlock_0"),
            "decoder/Embed_0/embedding#2",
        ),
        tied="decoder/Embed_0/embedding",
    )


def _example(path):
    """Return a module of the examples, which the wheel of flax leaves out."""
    name = f"flax-{flax.__version__}"
    archive = pathlib.Path(sys.prefix) / "sdist" / f"{name}.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not here; make test fetches it")
    with tarfile.open(archive) as files:
        source = files.extractfile(f"{name}/examples/{path}").read()
    module = types.ModuleType(path.removesuffix(".py").replace("/", "."))
    sys.modules[module.__name__] = module  # dataclasses look for it there
    exec(compile(source, path, "exec"), vars(module))
    return module
