"""How a program ends whose input is wrong."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def refused_plainly() -> Iterator[None]:
    """Ends the program with what is wrong with its input, and without a traceback."""
    try:
        yield
    except ValueError as error:
        sys.exit(str(error))
