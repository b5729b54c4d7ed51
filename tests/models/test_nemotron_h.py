import dataclasses
import functools
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from models.hugging_face import nemotron_h as hugging_face
from models.load import load
from models.nemotron_h import SIZES, NemotronH
from models.parts.mamba import Mamba, chunk_scan
from models.save import save
from tests.models.small import NEMOTRON_H as SMALL

TOKENS_BT = np.random.default_rng(0).integers(0, 256, size=(2, 12)).astype(np.int32)


def parameters(module, inputs):
    """Random ones of the module, those that are vectors around one."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return jax.tree.map(
        lambda p: (rng.normal(scale=0.2, size=p.shape) + (p.ndim == 1)).astype(p.dtype), shapes
    )


@functools.cache
def compiled(config):
    return jax.jit(NemotronH(config).apply, static_argnames="before_head")


PARAMS = parameters(NemotronH(SMALL), TOKENS_BT)


def recurrence_inputs(T, *, G=2, N=4, H=3, S=5, dtype=jnp.float32):
    rng = np.random.default_rng(T)
    x, B, C = (rng.normal(size=(2, T, *s)).astype(dtype) for s in ((N, H), (G, S), (G, S)))
    dt = rng.uniform(0, 2, size=(2, T, N)).astype(np.float32)
    return x, dt, -rng.uniform(0.1, 2, size=N).astype(np.float32), B, C


def one_after_the_other(x, dt, A, B, C):
    """The recurrence as it is defined, in float64."""
    x, dt, A, B, C = (np.asarray(a, np.float64) for a in (x, dt, A, B, C))
    batch, T, N, H = x.shape
    G, S = B.shape[2:]
    state, y = np.zeros((batch, N, S, H)), np.zeros_like(x)
    for t in range(T):
        for n in range(N):
            g = n // (N // G)
            written = B[:, t, g, :, None] * x[:, t, n, None, :]
            step = dt[:, t, n, None, None]
            state[:, n] = np.exp(step * A[n]) * state[:, n] + step * written
            y[:, t, n] = (C[:, t, g, :, None] * state[:, n]).sum(axis=1)
    return y


def by_lax_scan(x, dt, A, B, C):
    """The recurrence as it is defined, differentiable."""
    heads = x.shape[2] // B.shape[2]
    B, C = (jnp.repeat(a, heads, axis=2) for a in (B, C))

    def step(state, now):
        x, dt, B, C = now
        written = dt[..., None, None] * B[..., :, None] * x[..., None, :]
        state = jnp.exp(dt * A)[..., None, None] * state + written
        return state, (C[..., None] * state).sum(axis=-2)

    state = jnp.zeros((x.shape[0], x.shape[2], B.shape[3], x.shape[3]))
    _, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(a, 1, 0) for a in (x, dt, B, C)))
    return jnp.moveaxis(y, 0, 1)


# Multiples of the chunk and not, shorter than it, chunks of one position, one chunk of all.
LENGTHS = [(16, 4), (13, 4), (3, 8), (1, 4), (5, 1), (12, 12)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "chunk_length"), LENGTHS)
def test_chunks_equal_one_position_after_the_other(length, chunk_length, groups):
    inputs = recurrence_inputs(length, G=groups)
    y = jax.jit(chunk_scan, static_argnames="chunk_length")(*inputs, chunk_length=chunk_length)
    # float32 sums of some tens of terms.
    np.testing.assert_allclose(y, one_after_the_other(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "chunk_length"), LENGTHS)
def test_gradients_of_chunks_equal_those_of_one_position_after_the_other(length, chunk_length):
    inputs = recurrence_inputs(length)
    cotangent = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)

    def gradients(recurrence):
        loss = jax.grad(lambda *a: jnp.sum(cotangent * recurrence(*a)), argnums=range(5))
        return jax.jit(loss)(*inputs)

    chunks = gradients(lambda *a: chunk_scan(*a, chunk_length=chunk_length))
    for ours, expected in zip(chunks, gradients(by_lax_scan), strict=True):
        # The same float32 sums in another order; those of A are over all positions.
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_strong_decay_overflows_nowhere():
    x, dt, A, B, C = recurrence_inputs(16)
    both = jax.value_and_grad(lambda *a: jnp.sum(chunk_scan(*a, chunk_length=8)), argnums=range(5))
    value, gradients = jax.jit(both)(x, 100 * dt, 10 * A, B, C)
    assert all(np.isfinite(leaf).all() for leaf in (value, *gradients))


def test_the_backward_keeps_one_array_as_long_as_a_chunk_for_each_position():
    length, chunk_length, heads = 64, 16, 4
    inputs = recurrence_inputs(length, N=heads, dtype=jnp.bfloat16)
    pullback = jax.eval_shape(
        lambda *a: jax.vjp(lambda *b: chunk_scan(*b, chunk_length=chunk_length), *a)[1], *inputs
    )
    of_positions = 2 * length * heads
    large = [kept for kept in jax.tree.leaves(pullback) if kept.size > of_positions * 8]
    assert [(kept.size, kept.dtype) for kept in large] == [
        (of_positions * chunk_length, jnp.bfloat16)
    ]


# Layers of Mamba-2, of MLPs and of attention, and the sum: that of the published checkpoint where
# it is known to the last, else the size in its name.
@pytest.mark.parametrize(
    ("size", "layers", "published"),
    [
        ("4B", (24, 24, 4), pytest.approx(4.5e9, abs=5e8)),
        ("8B", (24, 24, 4), 8_100_852_736),
        ("47B", (45, 48, 5), pytest.approx(47e9, abs=5e8)),
        ("56B", (54, 54, 10), 56_324_350_464),
        ("Nano-9B-v2", (27, 25, 4), 8_888_227_328),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(size, layers, published):
    c = SIZES[size]
    inner = c.num_mamba_heads * c.mamba_head_width
    channels = inner + 2 * c.num_mamba_groups * c.state_width
    mamba = (
        c.model_width * (inner + channels + c.num_mamba_heads)  # in
        + channels * (c.convolution_width + 1)
        + 3 * c.num_mamba_heads  # dt_bias, A_log, D
        + inner  # gated norm
        + inner * c.model_width  # out
    )
    mlp = 2 * c.model_width * c.mlp_width
    attention = c.model_width * c.head_width * (2 * c.num_heads + 2 * c.num_kv_heads)
    mixers = np.dot(layers, [mamba, mlp, attention])
    expected = mixers + (sum(layers) + 1 + 2 * c.vocab_size) * c.model_width
    params = jax.eval_shape(NemotronH(c).init, jax.random.key(0), TOKENS_BT)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == expected
    assert expected == published


def norm(x, scale, *, groups=1):
    split = x.reshape(*x.shape[:-1], groups, -1)
    split = split / np.sqrt((split**2).mean(-1, keepdims=True) + SMALL.norm_epsilon)
    return split.reshape(x.shape) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def mamba(x, p, c):
    batch, T, _ = x.shape
    N, H, G, S = c.num_mamba_heads, c.mamba_head_width, c.num_mamba_groups, c.state_width
    widths = np.cumsum([N * H, N * H, G * S, G * S])
    z, xBC, dt = np.split(x @ p["in_proj.weight"].T, [widths[0], widths[3]], axis=-1)
    kernel, K = p["conv1d.weight"][:, 0], c.convolution_width
    convolved = np.zeros_like(xBC) + p["conv1d.bias"]
    for t in range(T):
        for back in range(min(K, t + 1)):
            convolved[:, t] += xBC[:, t - back] * kernel[:, K - 1 - back]
    x, B, C = np.split(silu(convolved), [N * H, N * H + G * S], axis=-1)
    x = x.reshape(batch, T, N, H)
    B, C = B.reshape(batch, T, G, S), C.reshape(batch, T, G, S)
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    y = one_after_the_other(x, dt, -np.exp(p["A_log"]), B, C) + p["D"][:, None] * x
    gated = y.reshape(z.shape) * silu(z)
    return norm(gated, p["norm.weight"], groups=G) @ p["out_proj.weight"].T


def attention(x, p, c):
    def heads(name, number):
        return (x @ p[f"{name}_proj.weight"].T).reshape(*x.shape[:2], number, -1).swapaxes(1, 2)

    q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
    k, v = (np.repeat(a, c.num_heads // c.num_kv_heads, axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(c.head_width)
    weights = np.exp(scores) * np.tri(x.shape[1])
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    return out.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ p["o_proj.weight"].T


def mlp(x, p, c):
    return np.maximum(x @ p["up_proj.weight"].T, 0) ** 2 @ p["down_proj.weight"].T


def stored_shapes(c):
    """The shape of every tensor of a checkpoint, as PyTorch has them."""
    D, inner = c.model_width, c.num_mamba_heads * c.mamba_head_width
    channels = inner + 2 * c.num_mamba_groups * c.state_width
    q, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
    mixers = {
        "M": {
            "in_proj.weight": (inner + channels + c.num_mamba_heads, D),
            "conv1d.weight": (channels, 1, c.convolution_width),
            "conv1d.bias": (channels,),
            **dict.fromkeys(("dt_bias", "A_log", "D"), (c.num_mamba_heads,)),
            "norm.weight": (inner,),
            "out_proj.weight": (D, inner),
        },
        "*": {
            "q_proj.weight": (q, D),
            "k_proj.weight": (kv, D),
            "v_proj.weight": (kv, D),
            "o_proj.weight": (D, q),
        },
        "-": {"up_proj.weight": (c.mlp_width, D), "down_proj.weight": (D, c.mlp_width)},
    }
    shapes = {
        "backbone.embeddings.weight": (c.vocab_size, D),
        "backbone.norm_f.weight": (D,),
        "lm_head.weight": (c.vocab_size, D),
    }
    for i, letter in enumerate(c.pattern):
        shapes[f"backbone.layers.{i}.norm.weight"] = (D,)
        for name, shape in mixers[letter].items():
            shapes[f"backbone.layers.{i}.mixer.{name}"] = shape
    return shapes


def reference_logits(tensors, c):
    """The equations of the whole model, in float64, on the tensors of a checkpoint."""
    p = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    x = p["backbone.embeddings.weight"][TOKENS_BT]
    for i, letter in enumerate(c.pattern):
        prefix = f"backbone.layers.{i}.mixer."
        own = {name.removeprefix(prefix): p[name] for name in p if name.startswith(prefix)}
        mixer = {"M": mamba, "*": attention, "-": mlp}[letter]
        x = x + mixer(norm(x, p[f"backbone.layers.{i}.norm.weight"]), own, c)
    return norm(x, p["backbone.norm_f.weight"]) @ p["lm_head.weight"].T


def test_a_checkpoint_has_the_logits_of_the_equations(tmp_path):
    """12 positions, where a chunk has 5. Transformers 4.57 has no Nemotron-H."""
    rng = np.random.default_rng(1)
    tensors = {
        name: np.float32(rng.normal(scale=0.2, size=shape) + (len(shape) == 1))
        for name, shape in stored_shapes(SMALL).items()
    }
    (tmp_path / "config.json").write_text(json.dumps(hugging_face.write_config(SMALL)))
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    params = jax.tree.map(np.asarray, loaded.params)
    expected_BTV = reference_logits(tensors, SMALL)
    logits_BTV = jax.jit(loaded.module.apply)({"params": params}, TOKENS_BT)
    assert np.abs(expected_BTV).max() > 1
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    # Of a sequence that is padded behind, what is before the padding.
    padded_BT = TOKENS_BT.copy()
    padded_BT[1, 7:] = 0
    logits_BTV = np.asarray(jax.jit(loaded.module.apply)({"params": params}, padded_BT))
    np.testing.assert_allclose(logits_BTV[1, :7], expected_BTV[1, :7], rtol=1e-4, atol=1e-4)

    save(tmp_path / "back", loaded.module, params)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_logits_are_the_product_of_their_factors():
    x_BTD, kernel_DV = compiled(SMALL)(PARAMS, TOKENS_BT, before_head=True)
    # The same float32 sums, perhaps in another order.
    logits = compiled(SMALL)(PARAMS, TOKENS_BT)
    np.testing.assert_allclose(logits, x_BTD @ kernel_DV, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # transformers warns of its own future when imported
def test_one_group_equals_the_mixer_of_transformers():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip("transformers")
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    config = dataclasses.replace(SMALL, num_mamba_groups=1, mamba_head_width=16)
    reference = Mamba2Mixer(
        Mamba2Config(
            hidden_size=config.model_width,
            num_heads=config.num_mamba_heads,
            head_dim=config.mamba_head_width,
            expand=2,
            n_groups=1,
            state_size=config.state_width,
            conv_kernel=config.convolution_width,
            chunk_size=config.chunk_length,
            layer_norm_epsilon=config.norm_epsilon,
        ),
        layer_idx=0,
    )
    x_BTD = np.random.default_rng(0).normal(size=(2, 12, config.model_width)).astype(np.float32)
    params = parameters(Mamba(config), x_BTD)
    stored = hugging_face.stored_as(dataclasses.replace(config, pattern="M"))
    ours = traverse_util.flatten_dict(params["params"], sep="/")
    with torch.no_grad():
        for name, theirs in reference.named_parameters():
            (path,) = (
                p for p, s in stored.items() if s.names == (f"backbone.layers.0.mixer.{name}",)
            )
            (tensor,) = stored[path].write(np.asarray(ours[path.removeprefix("layers_0/mamba/")]))
            assert theirs.shape == tensor.shape
            theirs.copy_(torch.from_numpy(tensor.copy()))
        normed = norm(x_BTD, np.asarray(ours["norm/scale"]))
        expected = reference.torch_forward(torch.from_numpy(normed)).numpy()
    # The same float32 sums in another order.
    found = jax.jit(Mamba(config).apply)(params, x_BTD)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_no_position_sees_a_later_token():
    t = 7
    changed_BT = TOKENS_BT.copy()
    changed_BT[:, t] = (changed_BT[:, t] + 1) % 256
    before, after = (compiled(SMALL)(PARAMS, x) for x in (TOKENS_BT, changed_BT))
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert (np.abs(before[:, t:] - after[:, t:]).max(-1) > 1e-4).all()


def test_chunks_of_every_length_give_the_same_logits():
    whole, *parts = (
        compiled(dataclasses.replace(SMALL, chunk_length=n))(PARAMS, TOKENS_BT) for n in (12, 4, 5)
    )
    for logits in parts:
        np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-4)


def test_computing_in_16_bits_changes_logits_little():
    exact = compiled(SMALL)(PARAMS, TOKENS_BT)
    half = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    logits = compiled(half)(PARAMS, TOKENS_BT)
    assert logits.dtype == jnp.bfloat16
    error = np.asarray(logits, np.float32) - exact
    # bfloat16 rounds to 0.4 percent, some ten times in a row.
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "M-E"}, "pattern 'M-E' has 'E'"),
        ({"num_kv_heads": 3}, "3 key-value heads"),
        ({"num_mamba_groups": 3}, "4 Mamba heads do not make 3"),
        ({"chunk_length": 0}, "chunk_length is 0"),
    ],
)
def test_a_config_that_cannot_be_says_so(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("size", SIZES)
def test_configs_are_read_as_they_were_written(size):
    config = SIZES[size]
    written = hugging_face.write_config(config)
    types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    assert hugging_face.read_config(written, **types) == config
    del written["head_dim"]  # the older checkpoints have the other name only
    assert hugging_face.read_config(written, **types) == config


def test_a_config_of_another_model_is_refused():
    written = hugging_face.write_config(SMALL) | {"time_step_limit": [0.001, 0.1]}
    with pytest.raises(ValueError, match="time_step_limit is"):
        hugging_face.read_config(written)
