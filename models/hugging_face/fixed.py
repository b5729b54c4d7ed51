"""What a config.json can say, but our models cannot."""

from collections.abc import Mapping
from typing import Any


def check_fixed(stored: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Check that a config.json has the values of `fixed`, where it says anything but null.

    Raises:
      ValueError: it has another.
    """
    for key, ours in fixed.items():
        theirs = stored.get(key)
        if theirs is not None and theirs != ours:
            raise ValueError(f"{key} is {theirs!r} in the config.json; only {ours!r} is supported")
