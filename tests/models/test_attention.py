import types

import jax
import jax.numpy as jnp
import pytest

from models.parts.attention import _implementation


@pytest.mark.parametrize(
    ("capability", "dtype", "head_width", "expected"),
    [
        ("9.0", "bfloat16", 256, "cudnn"),  # Gemma on an H100
        ("10.0", "bfloat16", 192, "cudnn"),  # DeepSeek on a B200
        ("8.0", "float16", 128, "cudnn"),  # LLaMA-2 on an A100
        ("8.0", "bfloat16", 192, "xla"),
        ("8.9", "bfloat16", 256, "xla"),
        ("7.0", "float16", 64, "xla"),
        ("9.0", "bfloat16", 100, "xla"),
        ("9.0", "float32", 128, "xla"),
    ],
)
def test_flash_attention_is_asked_for_what_it_takes(
    capability, dtype, head_width, expected, monkeypatch
):
    """Else cuDNN raises a NotImplementedError."""
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert (
        _implementation(jax.ShapeDtypeStruct((1, 4, 2, head_width), jnp.dtype(dtype))) == expected
    )


def test_a_cpu_has_no_flash_attention():
    assert _implementation(jax.ShapeDtypeStruct((1, 4, 2, 128), jnp.bfloat16)) == "xla"
