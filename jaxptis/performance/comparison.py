"""Where two timelines of one plan part, such as a predicted and a measured one."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import inf
from typing import Protocol, TypeVar

from jaxptis.performance.bubbles import Bubble
from jaxptis.performance.spans import Span, TransferSpan

Key = TypeVar("Key", bound=Hashable)
Keyed = tuple[Key, Span | TransferSpan]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The seconds of something in a timeline, and in the other."""

    here_s: float
    there_s: float

    @property
    def ratio(self) -> float:
        """What is here over what is there; 1 where neither has anything."""
        if self.here_s == self.there_s:
            return 1.0
        return self.here_s / self.there_s if self.there_s else inf


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two timelines of one plan, side by side.

    Attributes:
        step: of the whole step.
        kinds: of a task of this kind that both ran, on average.
        tasks: of a task of this stage and kind, on average.
        transfers: of a transfer from this device to that, on average.
        busy: of each device, all of its tasks.
        exposed: of each device, transfers while it computes nothing.
        waiting: of each device, what is left.
    """

    step: Pair
    kinds: Mapping[str, Pair]
    tasks: Mapping[tuple[int, str], Pair]
    transfers: Mapping[tuple[int, int], Pair]
    busy: tuple[Pair, ...]
    exposed: tuple[Pair, ...]
    waiting: tuple[Pair, ...]

    def text(self) -> str:
        """Return a table: what, milliseconds here and there, and the ratio."""
        lines = [f"{'':28}{'here ms':>12}{'there ms':>12}{'ratio':>8}"]
        for what, pair in self._rows():
            lines.append(
                f"{what:28}{pair.here_s * 1e3:12.3f}{pair.there_s * 1e3:12.3f}{pair.ratio:8.3f}"
            )
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.text()

    def _rows(self) -> Iterator[tuple[str, Pair]]:
        yield "step", self.step
        yield from ((f"{kind}, mean", pair) for kind, pair in sorted(self.kinds.items()))
        for (stage, kind), pair in sorted(self.tasks.items()):
            yield f"{stage}{kind}, mean", pair
        for (source, target), pair in sorted(self.transfers.items()):
            yield f"transfer {source} to {target}, mean", pair
        for device, pair in enumerate(self.busy):
            yield f"device {device} computes", pair
            yield f"device {device} only transfers", self.exposed[device]
            yield f"device {device} waits", self.waiting[device]


class Seen(Protocol):
    """What is looked at of a timeline."""

    @property
    def step_s(self) -> float: ...
    @property
    def spans(self) -> Sequence[Sequence[Span]]: ...
    @property
    def transfers(self) -> Sequence[TransferSpan]: ...
    @property
    def bubbles(self) -> Sequence[Bubble]: ...


def compare(here: Seen, there: Seen) -> Comparison:
    """Put two timelines of one plan side by side.

    Raises:
        ValueError: they have not the same stages on the same devices.
    """
    _check(here, there)
    ours, theirs = list(_tasks(here)), list(_tasks(there))
    # Only in one stands a task that has nothing to do: it is predicted, and not run.
    both = {span.task for span in ours} & {span.task for span in theirs}
    return Comparison(
        step=Pair(here_s=here.step_s, there_s=there.step_s),
        kinds=_means(
            [(span.task.kind, span) for span in ours if span.task in both],
            [(span.task.kind, span) for span in theirs if span.task in both],
        ),
        tasks=_means(
            [((span.task.stage, span.task.kind), span) for span in ours],
            [((span.task.stage, span.task.kind), span) for span in theirs],
        ),
        transfers=_means(
            [((span.source, span.target), span) for span in here.transfers],
            [((span.source, span.target), span) for span in there.transfers],
        ),
        busy=_pairs(here, there, lambda step_s, bubble: step_s - bubble.idle_s),
        exposed=_pairs(here, there, lambda _, bubble: bubble.exposed_s),
        waiting=_pairs(here, there, lambda _, bubble: bubble.idle_s - bubble.exposed_s),
    )


def _tasks(timeline: Seen) -> Iterator[Span]:
    return (span for row in timeline.spans for span in row)


def _means(here: Iterable[Keyed[Key]], there: Iterable[Keyed[Key]]) -> dict[Key, Pair]:
    """Return the mean seconds by key; 0 for a key that only the other has."""
    seconds: dict[Key, tuple[list[float], list[float]]] = {}
    for side, keyed in enumerate((here, there)):
        for key, span in keyed:
            seconds.setdefault(key, ([], []))[side].append(span.end_s - span.start_s)
    return {
        key: Pair(here_s=sum(ours) / max(len(ours), 1), there_s=sum(theirs) / max(len(theirs), 1))
        for key, (ours, theirs) in seconds.items()
    }


def _pairs(here: Seen, there: Seen, seconds: Callable[[float, Bubble], float]) -> tuple[Pair, ...]:
    return tuple(
        Pair(here_s=seconds(here.step_s, a), there_s=seconds(there.step_s, b))
        for a, b in zip(here.bubbles, there.bubbles, strict=True)
    )


def _check(here: Seen, there: Seen) -> None:
    ours, theirs = (
        [sorted({span.task.stage for span in row}) for row in each.spans] for each in (here, there)
    )
    for device, (a, b) in enumerate(zip_longest(ours, theirs)):
        if a != b:
            raise ValueError(
                f"device {device} runs stages {a} in one timeline and {b} in the other; compare "
                "two timelines of one plan"
            )
