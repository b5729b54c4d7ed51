"""Run passes one after the other: check, name and dump after each. It knows no pass."""

import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

log = logging.getLogger(__name__)


class IR(Protocol):
    """What every intermediate form can do."""

    def check(self) -> None: ...

    def text(self) -> str: ...


T = TypeVar("T", bound=IR)


class Dump:
    """Writes texts to numbered files, whose listing is the compiler's table of contents."""

    def __init__(self, directory: str | None) -> None:
        """With None as the directory nothing is written."""
        self._directory = None if directory is None else pathlib.Path(directory)
        self._count = 0
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)

    @property
    def enabled(self) -> bool:
        return self._directory is not None

    def step(self, name: str, text: str) -> None:
        """Write `NN.name.txt`, where NN counts the steps."""
        self.file(f"{self._count:02d}.{name}", text)
        self._count += 1

    def file(self, name: str, text: str) -> None:
        """Write `name.txt`."""
        if self._directory is not None:
            (self._directory / f"{name}.txt").write_text(text)


def run(value: T, passes: Sequence[Callable[[T], T]], dump: Dump) -> T:
    """Run `passes` on `value` in order.

    Raises:
      Exception: what a pass or its check raised, with a note that names the pass.
    """
    for a_pass in passes:
        name = a_pass.__name__
        try:
            value = a_pass(value)
            value.check()
        except Exception as error:
            error.add_note(f"in the pass {name}")
            raise
        log.debug("%s", name)
        if dump.enabled:
            dump.step(name, value.text())
    return value
