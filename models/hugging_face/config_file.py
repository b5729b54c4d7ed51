"""What the config.json of a checkpoint says."""

import dataclasses
import json
import math
import pathlib
import re
import typing
from collections.abc import Mapping
from typing import Any

_MAY_BE_0 = ("num_blocks", "num_dense_blocks", "mscale")
_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      ValueError: it is missing, or there is another thing in it.
    """
    if not file.is_file():
        raise ValueError(f"the file {file} is missing; name the folder of a checkpoint")
    try:
        read = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} is not a JSON object")
    return read


def read_config_file(file: pathlib.Path) -> dict[str, Any]:
    """Return what a config.json says of a model; a key that is null says nothing.

    Raises:
      ValueError: like `read_json`; or a number is none, or what it says is in a form that is not
        read: of a quantized model, or of transformers 5.
    """
    stored = _said(read_json(file), file)
    if "quantization_config" in stored:
        raise ValueError(
            f"{file} is of a quantized model, {stored['quantization_config']}; convert it to "
            "bfloat16, as DeepSeek's fp8_cast_bf16.py does, and delete quantization_config"
        )
    if "rope_parameters" in stored or "rope_parameters" in stored.get("text_config", {}):
        raise ValueError(
            f"{file} has rope_parameters, as transformers 5 writes them; in their place write "
            "rope_theta, and rope_scaling if there is any, as transformers 4 does"
        )
    return stored


def _said(stored: Mapping[str, Any], file: pathlib.Path) -> dict[str, Any]:
    for key, value in stored.items():
        quoted = isinstance(value, str) and _NUMBER.fullmatch(value)
        if quoted or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{file} has {key} {value!r}; write a number")
    return {
        key: _said(value, file) if isinstance(value, dict) else value
        for key, value in stored.items()
        if value is not None
    }


def check_numbers(config: Any) -> None:
    """Check the numbers of a config that was read, and of configs in it.

    Raises:
      ValueError: one is not of the type of its field, or is not positive, as all but a few are.
    """
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), types[field.name]
        wanted = set(typing.get_args(wanted) or [wanted])
        if int in wanted and float not in wanted and isinstance(value, float):
            raise ValueError(f"{field.name} is {value!r}; write a whole number")
        if dataclasses.is_dataclass(value):
            check_numbers(value)
        if not wanted & {int, float} or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{field.name} is {value!r}; write a number")
        if value < 0 or (value == 0 and field.name not in _MAY_BE_0):
            raise ValueError(f"{field.name} is {value}; write a positive number")
