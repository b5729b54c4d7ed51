"""Checkpoints of random parameters, and changes of their files."""

import dataclasses
import json

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from models.load import parameter_types
from tests.models import small


def random_params(module, dtype=np.float32):
    rng = np.random.default_rng(1)
    flat = {
        path: (rng.normal(scale=0.3, size=each.shape) + (len(each.shape) == 1)).astype(dtype)
        for path, each in parameter_types(module).items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def read(params):
    return jax.tree.map(np.asarray, params)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.asarray(a).dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# A model whose leaves are small beside the whole.
DEEP = dataclasses.replace(
    small.LLAMA2, vocab_size=256, model_width=64, mlp_width=8192, num_blocks=6
)
LARGEST = 64 * 8192 * 4  # bytes, of a leaf
SHARD = 5 * LARGEST


def rewrite(file, change):
    """Change what a JSON file says."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def change_config(**values):
    return lambda folder: rewrite(folder / "config.json", lambda config: config | values)


def change_tensors(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file)

    return spoil
