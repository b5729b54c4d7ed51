"""What the processes of a run know of each other: barriers, one plan, and who has failed.

Without `jax.distributed` there is one process, and nothing here does anything.
"""

import atexit
import collections
import functools
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from passes import jaxprs

BEAT_S = 1.0  # between two signs of life
LOST_S = 30.0  # without one; waiting for a transfer or a compilation does not hold them up
REMEMBERED = 64  # calls, to be compared with those of the others
PATIENCE_S = 3600.0  # at a barrier, with one that compiles for longer than others

LEFT = "left"  # the last sign of life of a process that ends

# How errors begin that the end of another process may have caused.
_FELT = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "CANCELLED")


def is_local(device: Any) -> bool:
    """Whether a device belongs to this process."""
    return device.process_index == jax.process_index()


class Processes:
    """The processes whose devices a pipeline has.

    Every process must make the same calls in the same order, of this class and of the programs
    that the processes run together.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        """Find the processes of `devices`, and watch over them if they are several.

        Raises:
          ValueError: some processes of the run have a device here, others not.
        """
        found = {device.process_index for device in devices}
        self._run: _Run | None = None
        if found == {jax.process_index()}:
            return
        idle = set(range(jax.process_count())) - found
        if idle:
            raise ValueError(
                f"the pipeline has devices of process {_listed(found)}, but none of "
                f"{_listed(idle)}; give it devices of every process, or start fewer processes"
            )
        self._run = _run()

    def begin(self, what: str) -> None:
        """Note what this process does next, which the others must do, too."""
        if self._run is not None:
            self._run.calls.append(what)

    def check_same(self, what: str, text: str) -> None:
        """Wait for the others, and check that they have the same text.

        Raises:
          ValueError: they have not.
        """
        if self._run is not None:
            self._run.check_same(what, text)

    def share(self, text: str) -> list[str]:
        """Wait for the others, and return the texts of all processes, in order."""
        return [text] if self._run is None else self._run.share(text)

    def of_first(self, make: Callable[[], str]) -> str:
        """Return what `make` gives in the first process, where alone it runs; wait for it.

        Raises:
          ValueError: there `make` raised it.
        """
        if self._run is None:
            return make()
        text = error = ""
        if jax.process_index() == 0:
            try:
                text = make()
            except ValueError as raised:
                error = str(raised)
        text, error = json.loads(self.share(json.dumps([text, error]))[0])
        if error:
            raise ValueError(error)
        return text

    def wait_for_all(self) -> None:
        """Wait until the others are here."""
        if self._run is not None:
            self._run.wait_for_all()


class _Run:
    """The key-value service that JAX runs in process 0, as one of the processes uses it.

    Each process leaves signs of life there. Process 0 misses them, or finds that a process has
    failed, and tells all the others, which stop. When process 0 itself is gone, so is the service.
    """

    def __init__(self) -> None:
        self._client: Any = jaxprs.process_service()
        self._me, self._count = jax.process_index(), jax.process_count()
        self.calls = Calls()
        self._meetings = itertools.count()
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=each, daemon=True) for each in (self._live, self._listen)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._leave)  # runs before JAX's, which was registered earlier

    def wait_for_all(self) -> None:
        name = f"jaxptis/meeting{next(self._meetings)}"
        self._client.wait_at_barrier(name, round(PATIENCE_S * 1e3))

    def share(self, text: str) -> list[str]:
        folder = f"jaxptis/text{next(self._meetings)}"
        self._set(f"{folder}/{self._me}", text)
        self.wait_for_all()
        texts = self._read(folder)
        return [texts[p] for p in range(self._count)]

    def check_same(self, what: str, text: str) -> None:
        digests = self.share(hashlib.sha256(text.encode()).hexdigest())
        others = [p for p, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise ValueError(
                f"the {what} of process 0 and of process {_listed(others)} differ; run the same "
                "program, with the same options and shapes, in every process"
            )

    def _live(self) -> None:
        """Give signs of life; in process 0, judge those of all."""
        judge = Judge(self._count) if self._me == 0 else None
        for beat in itertools.count():
            leaves = self._leaving.wait(BEAT_S)
            try:
                self._set(f"jaxptis/calls/{self._me}", self.calls.text())
                self._set(f"jaxptis/beat/{self._me}", LEFT if leaves else str(beat))
                if judge is None:
                    if leaves:
                        return
                    continue
                beats = self._read("jaxptis/beat")
                verdict = judge.verdict(
                    beats,
                    self._read("jaxptis/calls"),
                    self._read("jaxptis/failed"),
                    self._read("jaxptis/felt"),
                )
                for p in range(self._count if verdict else 0):
                    self._set(f"jaxptis/stop/{p}", str(verdict))
            except jax.errors.JaxRuntimeError:
                return  # the service is gone; `_listen` says so
            # Process 0 stays, and judges, until all leave.
            if verdict or (leaves and all(last == LEFT for last in beats.values())):
                return

    def _listen(self) -> None:
        """Stop this process, whose main thread may wait for ever, when told to."""
        try:
            why = self._client.blocking_key_value_get(f"jaxptis/stop/{self._me}", 2**31 - 1)
        except jax.errors.JaxRuntimeError as error:
            if "UNAVAILABLE" not in str(error):
                return  # this process has left the service
            why = "process 0, which coordinates the others, is gone"
        if not self._leaving.is_set():
            os.write(2, f"jaxptis: {why}; process {self._me} stops\n".encode())
            if self._me == 0:
                time.sleep(2 * BEAT_S)  # with it ends the service that tells the others
            os._exit(1)

    def _leave(self) -> None:
        """Say how this process ends, and if it failed, wait until all know."""
        left = jaxprs.process_service() is None  # by jax.distributed.shutdown()
        error = getattr(sys, "last_value", None)
        if error is not None and not left:
            text = f"{type(error).__name__}: {error}"
            folder = "felt" if str(error).startswith(_FELT) else "failed"
            order = self._client.key_value_increment("jaxptis/failures", 1)
            self._set(f"jaxptis/{folder}/{order}", f"process {self._me} failed: {text}")
            self._threads[1].join(LOST_S + 10 * BEAT_S)
        self._leaving.set()
        if not left:
            self._set(f"jaxptis/stop/{self._me}", "it leaves")
        for thread in self._threads:
            thread.join()

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value, allow_overwrite=True)

    def _read(self, folder: str) -> dict[int, str]:
        pairs = self._client.key_value_dir_get(folder)
        return {int(key.rsplit("/", 1)[1]): value for key, value in pairs}


class Calls:
    """The last calls of a process, with their numbers."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._last: collections.deque[tuple[int, str]] = collections.deque(maxlen=REMEMBERED)

    def append(self, what: str) -> None:
        """Note a call."""
        self._last.append((next(self._numbers), what))

    def text(self) -> str:
        """Return a form that `read` reads."""
        return "\n".join(f"{number} {what}" for number, what in self._last.copy())

    @staticmethod
    def read(text: str) -> dict[int, str]:
        """Return the calls by number."""
        pairs = (line.split(" ", 1) for line in text.splitlines())
        return {int(number): what for number, what in pairs}


class Judge:
    """Finds out, in process 0, who has failed."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seen: dict[int, tuple[str, float]] = {}
        self._felt_s: float | None = None

    def verdict(
        self,
        beats: Mapping[int, str],
        calls: Mapping[int, str],
        failed: Mapping[int, str],
        felt: Mapping[int, str],
    ) -> str | None:
        """Return why all must stop, if they must.

        Args:
          beats: of each process the last sign of life.
          calls: of each process the last calls, which all must make; `Calls.text`.
          failed: errors in the order in which they were raised.
          felt: likewise, those that another process may have caused.
        """
        now_s = time.monotonic()
        for p, last in beats.items():
            if last == LEFT or last != self._seen.get(p, ("", 0.0))[0]:
                self._seen[p] = last, now_s
        lost = [p for p, (_, seen_s) in self._seen.items() if now_s - seen_s > LOST_S]
        if lost:
            return (
                f"process {_listed(lost)} has shown no sign of life for {LOST_S:.0f} s (was it "
                "killed?)"
            )
        if failed:
            return failed[min(failed)]
        parted = self._parted(beats, {p: Calls.read(text) for p, text in calls.items()})
        if parted:
            return parted
        # When one is killed, those that wait for it fail before its silence is noticed.
        if felt and self._felt_s is None:
            self._felt_s = now_s
        waited = self._felt_s is not None and now_s - self._felt_s > LOST_S + 2 * BEAT_S
        return felt[min(felt)] if waited or len(felt) == self._count else None

    def _parted(self, beats: Mapping[int, str], calls: Mapping[int, dict[int, str]]) -> str | None:
        """Return which processes wait for each other in different calls, if some do."""
        first = calls.get(0, {})
        for p, theirs in calls.items():
            for number in sorted(first.keys() & theirs.keys()):
                if first[number] != theirs[number]:
                    return (
                        f"process 0 has come to {first[number]}, process {p} to {theirs[number]}; "
                        "make the same calls in every process"
                    )
        last = {p: max(theirs, default=-1) for p, theirs in calls.items()}
        ahead = max(last, key=lambda p: last[p], default=0)
        for p, number in last.items():
            if beats.get(p) == LEFT and number < last[ahead]:
                what = calls[ahead].get(number + 1, "more steps")
                return (
                    f"process {p} has ended, but process {ahead} has come to {what}; make the same "
                    "calls in every process"
                )
        return None


@functools.cache
def _run() -> _Run:
    return _Run()


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
