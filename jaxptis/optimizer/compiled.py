"""Functions compiled to machine code, once for all processes: the search simulates many steps."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba

_FOLDER = Path(__file__).parent


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of the optimizer; it lets other threads run.

    Numba keeps what it compiled until the function's own file changes. It may call functions of the
    other files, so it is compiled again when any of them has changed.
    """
    changed_s = max(path.stat().st_mtime for path in _FOLDER.rglob("*.py"))
    file = Path(function.__code__.co_filename)
    for path in (file.parent / "__pycache__").glob(f"{file.stem}.{function.__name__}-*.nbi"):
        with suppress(OSError):  # another process may have been faster
            if path.stat().st_mtime < changed_s:
                path.unlink()
    return numba.njit(cache=True, nogil=True)(function)
