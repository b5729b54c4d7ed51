"""Functions compiled to machine code, once for all processes: a search simulates many steps."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba

_PACKAGE = Path(__file__).parents[1]


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function; it lets other threads run.

    Numba keeps what it compiled until the function's own file changes. It may call functions of the
    other files, so it is compiled again when any file of the package has changed.
    """
    changed_s = max(path.stat().st_mtime for path in _PACKAGE.rglob("*.py"))
    file = Path(function.__code__.co_filename)
    for path in (file.parent / "__pycache__").glob(f"{file.stem}.{function.__name__}-*.nbi"):
        with suppress(OSError):  # another process may have been faster
            if path.stat().st_mtime < changed_s:
                path.unlink()
    return numba.njit(cache=True, nogil=True)(function)
