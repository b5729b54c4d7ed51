"""Where programs print their tables."""

from rich.console import Console

FILE_WIDTH = 120  # characters of what is not printed to a terminal


def wide_console(*, quiet: bool = False) -> Console:
    """Returns a console that has room for tables where it writes to a file, too."""
    console = Console(quiet=quiet)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console
