"""A bar that shows how far a search is, and what it has found."""

import contextlib
import math
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxptis.optimizer.certificate import Certificate
from jaxptis.pictures.words import duration


@contextlib.contextmanager
def search_bar(
    console: Console, certificate: Certificate
) -> Iterator[Callable[[float, float], None]]:
    """Yields what shows the fraction that is done, and the best step so far with its gap."""
    columns = TextColumn("planning"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def show(done: float, best_s: float) -> None:
            found = f"best so far {duration(best_s)}, gap at most {certificate.gap(best_s):.2%}"
            text = found if math.isfinite(best_s) else "nothing that fits so far"
            progress.update(task, completed=done, description=text)

        yield show
