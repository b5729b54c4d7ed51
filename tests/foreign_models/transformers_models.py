"""Models of Hugging Face's transformers, in linen. Each says what it asks of a front end."""

import dataclasses
import functools
import types
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from tests.foreign_models.foreign_model import (
    HEAD_WIDTH,
    MLP_WIDTH,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KV_HEADS,
    B,
    D,
    ForeignModel,
    T,
    V,
    cross_entropy,
    layers,
    package,
)

# As LLaMA, Gemma and RoBERTa call them.
_SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": MLP_WIDTH,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": NUM_HEADS,
    # LLaMA keeps this many of the 2 * HEAD_WIDTH sines; RoBERTa counts positions from 2.
    "max_position_embeddings": 2 * T,
}
_AS_FUNCTION: dict[str, Any] = {"input_shape": (1, T), "_do_init": False}
_GPT2_FACTS: dict[str, Any] = {
    "layers": layers(
        "transformer", ("transformer/h/{}/attn", "transformer/h/{}/mlp"), "transformer/wte"
    ),
    "tied": "transformer/wte/embedding",
}


def llama():
    """Rotary tables are closed over; each attention indexes its own."""
    transformers = package("transformers")
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=NUM_KV_HEADS)
    return _decoder(
        transformers.FlaxLlamaForCausalLM(config, **_AS_FUNCTION),
        layers=layers(
            "model/embed_tokens",
            ("model/layers/{}/self_attn", "model/layers/{}/mlp"),
            "lm_head",
        ),
    )


def gemma():
    """The embedding is scaled, and read again by the head; so it lives on two devices."""
    transformers = package("transformers")
    config = transformers.GemmaConfig(
        **_SIZES,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_WIDTH,
        hidden_activation="gelu_pytorch_tanh",
    )
    return _decoder(
        transformers.FlaxGemmaForCausalLM(config, **_AS_FUNCTION),
        layers=layers(
            "model/embed_tokens",
            ("model/layers/{}/self_attn", "model/layers/{}/mlp"),
            "model/embed_tokens#2",
        ),
        tied="model/embed_tokens",
    )


def roberta_remat():
    """Each block is one remat; three lookups in a row, one at positions made from the tokens."""
    transformers = package("transformers")
    config = transformers.RobertaConfig(**_SIZES, type_vocab_size=1)
    return _decoder(
        transformers.FlaxRobertaForMaskedLM(config, gradient_checkpointing=True, **_AS_FUNCTION),
        layers=layers(
            "roberta/embeddings",
            ("roberta/encoder/layer/{}",),
            "lm_head/dense",
            "roberta/embeddings/word_embeddings",
        ),
        tied="roberta/embeddings/word_embeddings",
        without_gradient=("key/bias",),  # adding to all keys changes no softmax
    )


def gpt2():
    """Without dropout. The embedding is also the head."""
    return _decoder(_gpt2(), **_GPT2_FACTS)


def gpt2_dropout_keys():
    """With a dropout key for each example, so that microbatches drop what the whole batch does."""
    model = _gpt2()

    def example_loss(params, ids_T, key):
        ids_BT = ids_T[None]
        out = model(ids_BT, params=params, dropout_rng=key, train=True)
        return cross_entropy(out.logits, ids_BT)

    def loss(params, batch):
        losses = jax.vmap(functools.partial(example_loss, params))(batch["ids"], batch["keys"])
        return jnp.mean(losses)

    return ForeignModel(loss=loss, params=_params(model), dropout={"keys": (B, 2)}, **_GPT2_FACTS)


def gpt2_dropout_key():
    """With one dropout key, from which every microbatch draws alike."""
    model = _gpt2()

    def loss(params, batch):
        out = model(batch["ids"], params=params, dropout_rng=batch["key"], train=True)
        return cross_entropy(out.logits, batch["ids"])

    return ForeignModel(
        loss=loss,
        params=_params(model),
        dropout={"key": (2,)},
        batch_axes={"ids": 0, "key": None},
        **_GPT2_FACTS,
    )


def t5():
    """The encoder's output is live beside the decoder; a position bias plus a mask is read by all.

    That bias is made in the first block of either side, and its table is so on all their devices.
    """
    attention = (
        "decoder/block/{}/layer/0/SelfAttention",
        "decoder/block/{}/layer/1/EncDecAttention",
    )
    names = layers(
        "shared",
        ("encoder/block/{}/layer/0/SelfAttention", "encoder/block/{}/layer/1/DenseReluDense"),
        (*attention, "decoder/block/{}/layer/2/DenseReluDense"),
        "shared#2",
    )
    return _t5(
        gradient_checkpointing=False,
        # The decoder's embedding is in its first attention.
        layers=(*names[:5], "decoder/block/0/layer/0/SelfAttention/k..shared", *names[6:]),
        passing=((5, (6, 9), (B, T, D)),),
    )


def t5_remat():
    """Every block is a remat that returns the position bias to the next ones."""
    names = layers("shared", ("encoder/block/{}/layer",), ("decoder/block/{}/layer",), "shared#2")
    return _t5(
        gradient_checkpointing=True,
        layers=(*names[:3], "decoder/block/0/layer/0/SelfAttention/k..shared", *names[4:]),
        passing=((3, (4,), (B, T, D)),),
    )


def bart():
    """As T5, but with learned positions, norms behind the blocks, and a bias without a gradient."""
    transformers = package("transformers")
    config = transformers.BartConfig(
        vocab_size=V,
        d_model=D,
        encoder_layers=NUM_BLOCKS,
        decoder_layers=NUM_BLOCKS,
        encoder_ffn_dim=MLP_WIDTH,
        decoder_ffn_dim=MLP_WIDTH,
        encoder_attention_heads=NUM_HEADS,
        decoder_attention_heads=NUM_HEADS,
        max_position_embeddings=T,
        forced_eos_token_id=None,
    )
    names = layers(
        "model",
        ("model/encoder/layers/{}/self_attn", "model/encoder/layers/{}"),
        tuple(f"model/decoder/layers/{{}}{part}" for part in ("/self_attn", "/encoder_attn", "")),
        "model/shared",
    )
    return _encoder_decoder(
        transformers.FlaxBartForConditionalGeneration(config, **_AS_FUNCTION),
        layers=(*names[:5], "model#2", *names[6:]),  # which embeds, too
        passing=((5, (6, 9), (B, T, D)),),
        tied="model/shared",
        without_gradient=("k_proj/bias", "final_logits_bias"),
    )


def _decoder(model, **facts):
    def loss(params, batch):
        return cross_entropy(model(batch["ids"], params=params).logits, batch["ids"])

    return ForeignModel(loss=loss, params=_params(model), **facts)


def _encoder_decoder(model, **facts):
    """With a part of the encoder's input masked, so that its mask depends on the batch."""

    def loss(params, batch):
        ids_BT = batch["ids"]
        mask_BT = (ids_BT % 4 > 0).astype(jnp.int32)
        out = model(ids_BT, attention_mask=mask_BT, decoder_input_ids=ids_BT, params=params)
        return cross_entropy(out.logits, ids_BT)

    return ForeignModel(loss=loss, params=_params(model), **facts)


def _t5(*, gradient_checkpointing, **facts):
    transformers = package("transformers")
    modeling = package("transformers.models.t5.modeling_flax_t5")
    config = transformers.T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=HEAD_WIDTH,
        d_ff=MLP_WIDTH,
        num_layers=NUM_BLOCKS,
        num_heads=NUM_HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=2 * T,
    )
    # It still passes names that jax.numpy.clip no longer has.
    clip = types.SimpleNamespace(
        **{**vars(jnp), "clip": lambda x, a_min=None, a_max=None: jnp.clip(x, a_min, a_max)}
    )
    with_clip = mock.patch.object(modeling, "jnp", clip)
    with with_clip:
        model = transformers.FlaxT5ForConditionalGeneration(
            config, gradient_checkpointing=gradient_checkpointing, **_AS_FUNCTION
        )
        made = _encoder_decoder(model, tied="shared", **facts)
    return dataclasses.replace(made, loss=with_clip(made.loss))


def _gpt2():
    transformers = package("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_layer=NUM_BLOCKS, n_head=NUM_HEADS, n_positions=T
    )
    return transformers.FlaxGPT2LMHeadModel(config, **_AS_FUNCTION)


def _params(model):
    return jax.jit(lambda key: model.init_weights(key, (1, T)))(jax.random.key(0))
