"""Hugging Face checkpoints as parameters, each of which is read when its values are asked for."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike

from models.hugging_face.config_file import check_numbers, read_config_file, read_json
from models.hugging_face.safetensors import DTYPES, Tensor, find_tensors
from models.hugging_face.stored import Stored
from models.registry import MODELS, HuggingFace, Model

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NUM_SHOWN = 40  # of what is wrong with a checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter in a checkpoint: np.asarray reads it, and nothing is kept of it.

    Attributes:
      shape: of the parameter.
      dtype: likewise, whatever it is stored as.
      tensors: in which it is stored.
      stored: how these make the parameter.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[Tensor, ...]
    stored: Stored

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return its values, read from the files a tensor at a time."""
        tensors = (tensor.read() for tensor in self.tensors)
        return self.stored.read(tensors, self.shape, dtype or self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that was loaded.

    Attributes:
      model: one of `MODELS`.
      module: its class with the config of the checkpoint.
      params: its parameters as nested dictionaries, whose leaves are `Parameter`s.
    """

    model: Model
    module: nn.Module
    params: dict[str, Any]


def load(
    folder: str | pathlib.Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Checkpoint:
    """Open a Hugging Face checkpoint: config.json, and one safetensors file or several.

    The names, shapes and types of all tensors are checked, and no values are read: each leaf of the
    parameters is read when it is turned into an array. What places them leaf by leaf never has the
    whole model in its memory. For the plain module:

        model = load(folder)
        params = jax.tree.map(jnp.asarray, model.params)
        logits = model.module.apply({"params": params}, tokens)

    Args:
      folder: of the checkpoint.
      dtype: in which the module computes.
      param_dtype: of the parameters; they are stored as float32, float16 or bfloat16.

    Raises:
      ValueError: the config.json is of no model that we have; a file is missing or broken; tensors
        are missing, unknown, of another shape than the config asks for, or of a type that is not
        read (forty are named).
    """
    folder = pathlib.Path(folder)
    model, config = read_model(folder / CONFIG, dtype=dtype, param_dtype=param_dtype)
    module, stored = model.module(config), model.hugging_face.stored_as(config)
    types, tensors = parameter_types(module), _find_tensors(folder, model.hugging_face.PREFIX)
    _check_tensors(folder, model.hugging_face, stored, types, tensors)
    leaves = {
        path: Parameter(
            shape=each.shape,
            dtype=each.dtype,
            tensors=tuple(tensors[name] for name in stored[path].names),
            stored=stored[path],
        )
        for path, each in types.items()
    }
    params = traverse_util.unflatten_dict(leaves, sep="/")
    return Checkpoint(model=model, module=module, params=params)


def parameter_types(module: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of every parameter of a language model, by its path."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)  # of any length
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    return traverse_util.flatten_dict(params, sep="/")


def _check_tensors(
    folder: pathlib.Path,
    form: HuggingFace,
    stored: Mapping[str, Stored],
    types: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raise a ValueError that says all that is wrong with the tensors of a checkpoint."""
    unread = tensors.keys() - {name for each in stored.values() for name in each.names}
    wrong = [
        *(line for path in stored for line in _wrong(stored[path], types[path].shape, tensors)),
        *(
            f"nothing reads {name}"
            for name in sorted(unread)
            if not any(re.fullmatch(known, name) for known in form.UNREAD)
        ),
    ]
    if wrong:
        more = [f"and {len(wrong) - NUM_SHOWN} more"] if len(wrong) > NUM_SHOWN else []
        advice = [
            text
            for pattern, text in form.ADVICE.items()
            if any(re.fullmatch(pattern, line) for line in wrong)
        ]
        lines = "\n  ".join([*wrong[:NUM_SHOWN], *more, *advice])
        raise ValueError(f"the tensors in {folder} are not those of its {CONFIG}:\n  {lines}")


def _wrong(stored: Stored, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield what is wrong with the tensors of a parameter of this shape."""
    wanted = stored.stored_shape(shape)
    for name in stored.names:
        if name not in tensors:
            yield f"{name} is missing"
        elif tensors[name].shape != wanted:
            yield f"{name} has shape {tensors[name].shape}, but the config asks for {wanted}"
        elif tensors[name].dtype not in DTYPES:
            yield f"{name} is stored as {tensors[name].dtype}; use one of {', '.join(DTYPES)}"


def read_model(file: pathlib.Path, **types: DTypeLike) -> tuple[Model, Any]:
    """Return the model that a config.json describes, and its config.

    Args:
      file: the config.json.
      **types: dtype and param_dtype of the config.

    Raises:
      ValueError: it describes none that we have.
    """
    stored = read_config_file(file)
    known = {kind: model for model in MODELS.values() for kind in model.hugging_face.MODEL_TYPES}
    kind = str(stored.get("model_type"))
    if kind not in known:
        raise ValueError(f"{file} has model_type {kind}; known are {', '.join(sorted(known))}")
    try:
        config = known[kind].hugging_face.read_config(stored, **types)
        check_numbers(config)
        return known[kind], config
    except KeyError as error:
        raise ValueError(f"{file} has no {error}, which a {kind} needs") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _find_tensors(folder: pathlib.Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the prefix that some may have."""
    found = _find_all(folder)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        twice = next(name for name in found if prefix + name in found)
        raise ValueError(f"{folder} has both {twice} and {prefix}{twice}; delete one of them")
    return tensors


def _find_all(folder: pathlib.Path) -> dict[str, Tensor]:
    if (folder / WHOLE).exists():
        return find_tensors(folder / WHOLE)
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} has neither {WHOLE} nor {INDEX}; write it as safetensors")
    file_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(it, str) for it in file_of.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files; copy it again")
    found: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        tensors = find_tensors(folder / file)
        found |= {name: it for name, it in tensors.items() if file_of.get(name, file) == file}
    return found
