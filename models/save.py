"""Parameters as Hugging Face checkpoints, which transformers reads with from_pretrained."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.experimental import multihost_utils

from models.hugging_face.config_file import read_json
from models.hugging_face.safetensors import DTYPES, write_tensors
from models.hugging_face.stored import Stored
from models.load import CONFIG, INDEX, NUM_SHOWN, WHOLE, parameter_types, read_model
from models.registry import MODELS, Model

SHARD_BYTES = 5 * 10**9
# What a checkpoint has beside the model, and what its config.json says and our configs do not.
BESIDE = (
    "tokenizer*",
    "*.model",
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "chat_template*",
    "generation_config.json",
    # Of models that transformers has no class of.
    *("configuration_*.py", "modeling_*.py"),
)
KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map")


def save(
    folder: str | pathlib.Path,
    module: nn.Module,
    params: Mapping[str, Any],
    *,
    like: str | pathlib.Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face checkpoint: config.json, and one safetensors file or several.

    The host holds the tensors of a file, twice, and the leaves that these are from. All is written
    to a folder beside, named "*.partial", which becomes `folder` when it is complete.

    With several processes all of them make this call, and see the folder. Each leaf is written by
    the first of those that hold it. No two write to one file: the files are numbered through, those
    of process 0 first.

    Args:
      folder: of the checkpoint; must not exist yet, or be empty.
      module: one of the classes in `MODELS`, or derived from one, with its config.
      params: its parameters, arrays of any kind, such as those of a training state.
      like: the checkpoint that was loaded. What its config.json says of special tokens, of the
        longest context and of its own classes is kept; these, its tokenizer and its settings for
        generation are copied.
      shard_bytes: at most so many are in a file, unless a single tensor has more.

    Raises:
      ValueError: the folder holds something; shard_bytes is not positive; the module is of no such
        class; leaves are missing, unknown, of other shapes, of a type that is not stored, or spread
        over processes (forty are named); `like` is no checkpoint of such a model.
    """
    folder = pathlib.Path(folder).resolve()
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; make it 1 or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; name a new folder")
    model = next((model for model in MODELS.values() if isinstance(module, model.module)), None)
    if model is None:
        raise ValueError(f"{type(module).__name__} is none of the models {', '.join(MODELS)}")
    if not isinstance(params, Mapping):
        raise ValueError(f"params is of type {type(params).__name__}; pass the params of a state")
    kept, beside = ({}, []) if like is None else _like(pathlib.Path(like), model, module)
    leaves = traverse_util.flatten_dict(params, sep="/")
    _check(leaves, parameter_types(module))
    stored = model.hugging_face.stored_as(module.config)
    writers = {path: min(_holders(leaves[path])) for path in stored}
    files = _plan(stored, leaves, writers, shard_bytes)
    own = {path: stored[path] for path in stored if writers[path] == jax.process_index()}
    dtype = np.dtype(leaves["embed/embedding"].dtype).name
    written = model.hugging_face.write_config(module.config) | {"torch_dtype": dtype}
    texts = {CONFIG: kept | written}
    if len(files) > 1:
        texts[INDEX] = _index(files)
    _write(folder, files, _tensors(own, leaves), texts, beside)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """A file to be written by a process, and the types of the tensors in it, by name."""

    name: str
    process: int
    types: dict[str, jax.ShapeDtypeStruct]


def _check(leaves: Mapping[str, Any], types: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise a ValueError if the leaves are not the parameters of these types, or not writable."""
    wrong = [
        *(f"{path} is missing" for path in types.keys() - leaves.keys()),
        *(f"the model has no {path}" for path in leaves.keys() - types.keys()),
    ]
    for path in types.keys() & leaves.keys():
        leaf, wanted = leaves[path], types[path].shape
        if leaf.shape != wanted:
            wrong.append(f"{path} has shape {leaf.shape}, in the model {wanted}")
        if np.dtype(leaf.dtype) not in DTYPES.values():
            known = ", ".join(map(str, DTYPES.values()))
            wrong.append(f"{path} is of type {leaf.dtype}; use one of {known}")
        if not _holders(leaf):
            wrong.append(f"{path} is spread over processes, of which none holds all of it")
    if wrong:
        more = [f"and {len(wrong) - NUM_SHOWN} more"] if len(wrong) > NUM_SHOWN else []
        lines = "\n  ".join([*sorted(wrong)[:NUM_SHOWN], *more])
        raise ValueError(f"these are not the parameters of this model:\n  {lines}")


def _holders(leaf: Any) -> set[int]:
    """Return the processes that have all of a leaf, which may be in parts."""
    found = set(range(jax.process_count()))
    for array in jax.tree.leaves(leaf):
        if isinstance(array, jax.Array):
            devices: set[Any] = array.sharding.device_set
            processes = {device.process_index for device in devices}
            found &= processes if array.is_fully_replicated or len(processes) == 1 else set()
    return found


def _plan(
    stored: Mapping[str, Stored],
    leaves: Mapping[str, Any],
    writers: Mapping[str, int],
    shard_bytes: int,
) -> list[_File]:
    """Return the files of all processes; each has its leaves in the order of `stored`."""
    groups: list[tuple[int, dict[str, jax.ShapeDtypeStruct]]] = []
    size = 0
    for path in sorted(stored, key=writers.__getitem__):
        shape = stored[path].stored_shape(leaves[path].shape)
        each = jax.ShapeDtypeStruct(shape, leaves[path].dtype)
        for name in (*stored[path].names, *stored[path].copies):
            size += _nbytes(each)
            if not groups or groups[-1][0] != writers[path] or size > shard_bytes:
                groups.append((writers[path], {}))
                size = _nbytes(each)
            groups[-1][1][name] = each
    count = len(groups)
    return [
        _File(
            name=WHOLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors",
            process=process,
            types=types,
        )
        for i, (process, types) in enumerate(groups, start=1)
    ]


def _tensors(stored: Mapping[str, Stored], leaves: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yield the tensors of leaves; each leaf is copied to the host when its turn comes."""
    for path, each in stored.items():
        tensors = each.write(_on_host(leaves[path]))
        yield from tensors
        yield from tensors[:1] * len(each.copies)


def _on_host(leaf: Any) -> np.ndarray:
    """Return the values of a leaf, of which an array on a device keeps no copy on the host."""
    replicated = isinstance(leaf, jax.Array) and leaf.is_fully_replicated
    return np.asarray(leaf.addressable_data(0) if replicated else leaf)


def _write(
    folder: pathlib.Path,
    files: Sequence[_File],
    tensors: Iterator[np.ndarray],
    texts: Mapping[str, Any],
    beside: Sequence[pathlib.Path],
) -> None:
    """Write the files of this process, which `tensors` are for, and in process 0 all others."""
    me = jax.process_index()
    # Of this run alone: another may write beside.
    run = int(multihost_utils.broadcast_one_to_all(np.int32(os.getpid())))
    partial = folder.with_name(f"{folder.name}.{run}.partial")
    if me == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a save that failed
        partial.mkdir(parents=True)
    multihost_utils.sync_global_devices("the folder is there")
    for file in files:
        if file.process == me:
            # The names first: zip asks for no tensor of the next file.
            write_tensors(partial / file.name, dict(zip(file.types, tensors, strict=False)))
    multihost_utils.sync_global_devices("all tensors are written")
    if me == 0:
        for name, content in texts.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        for path in beside:
            shutil.copy(path, partial)
        partial.rename(folder)
    multihost_utils.sync_global_devices("the checkpoint is complete")


def _like(
    folder: pathlib.Path, model: Model, module: Any
) -> tuple[dict[str, Any], list[pathlib.Path]]:
    """Return what the config.json of a checkpoint says of `KEPT`, and the files of `BESIDE`."""
    theirs, config = read_model(folder / CONFIG)
    if theirs is not model or config.vocab_size != module.config.vocab_size:
        raise ValueError(
            f"{folder} is a {type(config).__name__} of {config.vocab_size} tokens, and this a "
            f"{type(module.config).__name__} of {module.config.vocab_size}; save it like the "
            "checkpoint that it was loaded from"
        )
    stored = read_json(folder / CONFIG)
    text = stored | stored.get("text_config", {})
    found = [path for each in BESIDE for path in folder.glob(each) if path.is_file()]
    return {key: text[key] for key in KEPT if key in text}, found


def _nbytes(each: jax.ShapeDtypeStruct) -> int:
    return math.prod(each.shape) * np.dtype(each.dtype).itemsize


def _index(files: Sequence[_File]) -> dict[str, Any]:
    """Return which tensor is in which file."""
    size = sum(_nbytes(each) for file in files for each in file.types.values())
    places = {name: file.name for file in files for name in file.types}
    return {"metadata": {"total_size": size}, "weight_map": places}
