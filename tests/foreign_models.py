"""Small models that nobody here wrote, as their packages build them, and losses that call them."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

# B: batch, T: time, D: width, V: vocabulary.
B, T, D, V = 8, 8, 32, 64
NUM_BLOCKS = 2
NUM_HEADS, NUM_KV_HEADS, HEAD_WIDTH = 4, 2, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model, and what is known of it without looking at jaxptis.

    Attributes:
      loss: maps parameters and a batch to the mean over examples and positions.
      params: as the package draws them.
      layers: what its layers are called: one before the blocks, two a block, one behind them.
      tied: path of the embedding, if it is also the head.
      dropout: the batch's dropout keys, as leaves beside its tokens.
      batch_axes: as `jaxptis.pipeline` takes it.
      structure: the graph of an nnx model, whose state `params` is.
      module_loss: maps this nnx model and a batch to the loss.
    """

    loss: Callable[[Any, Any], Any]
    params: Any
    layers: tuple[str, ...]
    tied: str | None = None
    dropout: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    batch_axes: Any = 0
    structure: Any = None
    module_loss: Callable[[nnx.Module, Any], Any] | None = None

    def draw(self, seed):
        """Return parameters, each number of which is perturbed, and a batch.

        Several packages start scales or biases at zero, which would hide errors of what they scale.
        """
        random = np.random.default_rng(seed)

        def perturb(leaf):
            assert leaf.dtype == np.float32
            return np.asarray(leaf) + 0.1 * random.standard_normal(leaf.shape, np.float32)

        batch = {"ids": random.integers(0, V, size=(B, T), dtype=np.int32)}
        for name, shape in self.dropout.items():
            batch[name] = random.integers(0, 2**32, size=shape, dtype=np.uint32)
        return jax.tree.map(perturb, self.params), batch


def tied_leaf(path, leaf_path):
    """Whether `leaf_path`, of a leaf of a pytree, is the `path` of a tied embedding."""
    return jax.tree_util.keystr(leaf_path, simple=True, separator="/").startswith(path)


def cross_entropy(logits_BTV, ids_BT):
    """The mean, over all tokens but the first, of minus the log of the probability of each."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs_BTV, ids_BT[:, 1:, None], axis=-1))


def llama():
    transformers = _package("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=2 * T,  # it keeps this many of the 2 * HEAD_WIDTH sines
    )
    model = transformers.FlaxLlamaForCausalLM(config, input_shape=(1, T), _do_init=False)

    def loss(params, batch):
        return cross_entropy(model(batch["ids"], params=params).logits, batch["ids"])

    return ForeignModel(
        loss=loss,
        params=_linen_params(model),
        layers=_layers(
            "model/embed_tokens", "model/layers/{}/self_attn", "model/layers/{}/mlp", "lm_head"
        ),
    )


def gpt2():
    """Without dropout."""
    model = _gpt2()

    def loss(params, batch):
        return cross_entropy(model(batch["ids"], params=params).logits, batch["ids"])

    return ForeignModel(loss=loss, params=_linen_params(model), **_GPT2_FACTS)


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

    return ForeignModel(
        loss=loss, params=_linen_params(model), dropout={"keys": (B, 2)}, **_GPT2_FACTS
    )


def gpt2_dropout_key():
    """With one dropout key, from which every microbatch draws alike."""
    model = _gpt2()

    def loss(params, batch):
        out = model(batch["ids"], params=params, dropout_rng=batch["key"], train=True)
        return cross_entropy(out.logits, batch["ids"])

    return ForeignModel(
        loss=loss,
        params=_linen_params(model),
        dropout={"key": (2,)},
        batch_axes={"ids": 0, "key": None},
        **_GPT2_FACTS,
    )


def qwen3():
    qwen3 = _package("tunix.models.qwen3.model")
    config = qwen3.ModelConfig(
        num_layers=NUM_BLOCKS,
        vocab_size=V,
        embed_dim=D,
        hidden_dim=48,
        num_heads=NUM_HEADS,
        head_dim=HEAD_WIDTH,
        num_kv_heads=NUM_KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return _nnx_model(
        lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
        layers=_layers("embedder/input_embedding", "layers/{}/attn", "layers/{}/mlp", "lm_head/w"),
    )


def gemma3():
    gemma3 = _package("tunix.models.gemma3.model")
    config = gemma3.ModelConfig(
        num_layers=NUM_BLOCKS,
        num_embed=V,
        embed_dim=D,
        hidden_dim=48,
        num_heads=NUM_HEADS,
        head_dim=HEAD_WIDTH,
        num_kv_heads=NUM_KV_HEADS,
        sliding_window_size=T // 2,
        param_dtype=jnp.float32,
    )
    return _nnx_model(
        lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0)),
        layers=_layers(
            "embedder/input_embedding",
            "layers/{}/attn",
            "layers/{}/mlp",
            "embedder/input_embedding#2",
        ),
        tied="embedder/input_embedding",
    )


MODELS = {
    make.__name__: make
    for make in (llama, gpt2, gpt2_dropout_keys, gpt2_dropout_key, qwen3, gemma3)
}


def _package(name):
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} is in the extra 'foreign'")


def _layers(before, attention, mlp, behind):
    blocks = [(attention.format(i), mlp.format(i)) for i in range(NUM_BLOCKS)]
    return (before, *functools.reduce(operator.add, blocks), behind)


_GPT2_FACTS: dict[str, Any] = {
    "layers": _layers(
        "transformer", "transformer/h/{}/attn", "transformer/h/{}/mlp", "transformer/wte"
    ),
    "tied": "transformer/wte/embedding",
}


def _gpt2():
    transformers = _package("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_layer=NUM_BLOCKS, n_head=NUM_HEADS, n_positions=T
    )
    return transformers.FlaxGPT2LMHeadModel(config, input_shape=(1, T), _do_init=False)


def _linen_params(model):
    return jax.jit(lambda key: model.init_weights(key, (1, T)))(jax.random.key(0))


def _nnx_model(make, **facts):
    structure, params = nnx.split(nnx.jit(make)())

    def module_loss(module, batch):
        ids_BT = batch["ids"]
        positions_BT = jnp.broadcast_to(jnp.arange(T), ids_BT.shape)
        mask_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (*ids_BT.shape, T))
        logits_BTV, _ = module(ids_BT, positions_BT, None, mask_BTT)
        return cross_entropy(logits_BTV, ids_BT)

    def loss(params, batch):
        return module_loss(nnx.merge(structure, params), batch)

    return ForeignModel(
        loss=loss, params=params, structure=structure, module_loss=module_loss, **facts
    )
