"""The text form of a plan: a person reads, edits and compares it.

    jaxptis plan 1

    stage 0 on device 0
      embed_tokens
      layers/0/attention
    stage 1 on device 1 recompute all
      layers/0/mlp

    device 0: 0F0 0F1 0B0 0B1
    device 1: 1F0 1B0 1F1 1B1

An indented line is a layer of the stage above it, so moving a layer is moving a line. A stage that
recomputes more or less than what is cheap says so. `#` at the start of a line or after whitespace
starts a comment.
"""

import re
from dataclasses import dataclass
from typing import cast, get_args

from jaxptis.plan.plan import Plan, Recompute, StagePlan
from jaxptis.plan.task import Task

_HEADER = ("jaxptis", "plan", "1")


def to_text(plan: Plan) -> str:
    """Write a plan in the canonical form that `from_text` reads."""
    lines = [" ".join(_HEADER), ""]
    for index, stage in enumerate(plan.stages):
        ending = "" if stage.recompute == "cheap" else f" recompute {stage.recompute}"
        lines.append(f"stage {index} on device {stage.device}{ending}")
        lines += [f"  {name}" for name in stage.layers]
    lines.append("")
    for device, row in enumerate(plan.schedule):
        lines.append(" ".join([f"device {device}:", *map(str, row)]))
    return "\n".join(lines) + "\n"


def from_text(text: str, source: str = "plan") -> Plan:
    """Read a plan.

    Args:
        text: what `to_text` wrote, or what a person made of it.
        source: stands in front of every error: the path of the file, where there is one.

    Raises:
        ValueError: `source:line:column:` what is wrong, what was found, what is expected; or
            `source:` why the plan cannot run.
    """
    lines = _split(text, source)
    _read_header(lines[0])
    stages: list[_Stage] = []
    rows: dict[int, _Row] = {}
    inside_stage = False
    for line in lines[1:-1]:
        first = line.words[0]
        if line.indented:
            if not inside_stage:
                raise first.error("layer outside a stage", "'stage <number> on device <number>'")
            stages[-1].layers.append(_read_layer(line))
        elif first.text == "stage":
            stages.append(_read_stage(line, index=len(stages)))
            inside_stage = True
        elif first.text == "device":
            row = _read_row(line)
            if row.device in rows:
                raise row.word.error("device row twice", "every device once")
            rows[row.device] = row
            inside_stage = False
        else:
            raise first.error("unknown line", "'stage', 'device' or an indented layer")
    _check(stages, rows, end=lines[-1].words[0])
    try:
        return Plan(
            stages=tuple(
                StagePlan(
                    layers=tuple(word.text for word in stage.layers),
                    device=stage.device,
                    recompute=stage.recompute,
                )
                for stage in stages
            ),
            schedule=tuple(rows[device].tasks for device in range(len(rows))),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Word:
    text: str  # empty: the end of the line
    where: str

    def error(self, wrong: str, expected: str) -> ValueError:
        found = repr(self.text) if self.text else "the end"
        return ValueError(f"{self.where}: {wrong}: found {found}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class _Line:
    indented: bool
    words: tuple[_Word, ...]  # the last is the end of the line


@dataclass(frozen=True, kw_only=True)
class _Stage:
    word: _Word
    device: int
    recompute: Recompute
    layers: list[_Word]


@dataclass(frozen=True, kw_only=True)
class _Row:
    word: _Word
    device: int
    tasks: tuple[Task, ...]


def _split(text: str, source: str) -> list[_Line]:
    """Return the lines that say something, and then, always, one for the end of the text."""
    raw = text.splitlines()
    lines = []
    for number, line in enumerate(raw, start=1):
        line = re.split(r"(?<!\S)#", line, maxsplit=1)[0].rstrip()
        if line:
            starts = [*re.finditer(r"\S+", line), *re.finditer(r"\Z", line)]
            words = (
                _Word(text=match[0], where=f"{source}:{number}:{match.start() + 1}")
                for match in starts
            )
            lines.append(_Line(indented=line[0].isspace(), words=tuple(words)))
    end = _Word(text="", where=f"{source}:{len(raw) + 1}:1")
    return [*lines, _Line(indented=False, words=(end,))]


def _read_header(line: _Line) -> None:
    for word, expected in zip(line.words, _HEADER, strict=False):
        if word.text != expected:
            wrong = "unknown version" if expected == _HEADER[-1] else "not a plan"
            raise word.error(wrong, f"{expected!r} of the first line {' '.join(_HEADER)!r}")
    _read_end(line.words[len(_HEADER)])


def _read_stage(line: _Line, index: int) -> _Stage:
    """Read `stage 0 on device 0`, perhaps with `recompute all` behind it."""
    words = iter(line.words)
    next(words)
    word = next(words)
    if _read_number(word, "stage") != index:
        raise word.error("stage out of order", f"{index}")
    for expected in ("on", "device"):
        _read_literal(next(words), expected)
    word = next(words)
    device = _read_number(word, "device")
    ending = next(words)
    recompute: Recompute = "cheap"
    if ending.text == "recompute":
        level = next(words)
        if level.text not in get_args(Recompute):
            raise level.error("bad stage line", f"one of {', '.join(get_args(Recompute))}")
        recompute = cast(Recompute, level.text)
        _read_end(next(words))
    elif ending.text:
        raise ending.error("bad stage line", "'recompute' or the end of the line")
    return _Stage(word=word, device=device, recompute=recompute, layers=[])


def _read_layer(line: _Line) -> _Word:
    _read_end(line.words[1])
    return line.words[0]


def _read_row(line: _Line) -> _Row:
    """Read `device 0: 0F0 0B0`."""
    _, word, *tasks = line.words
    if not word.text.endswith(":"):
        raise word.error("bad device row", "a number and a colon, such as '0:'")
    number = _Word(text=word.text.removesuffix(":"), where=word.where)
    return _Row(
        word=word,
        device=_read_number(number, "device"),
        tasks=tuple(_read_task(task) for task in tasks[:-1]),
    )


def _read_task(word: _Word) -> Task:
    try:
        return Task.parse(word.text)
    except ValueError as error:
        raise ValueError(f"{word.where}: {error}") from error


def _read_number(word: _Word, what: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", word.text) is None:
        raise word.error(f"bad {what} number", "a whole number of at most nine digits")
    return int(word.text)


def _read_literal(word: _Word, expected: str) -> None:
    if word.text != expected:
        raise word.error("bad stage line", f"{expected!r} of 'stage <number> on device <number>'")


def _read_end(word: _Word) -> None:
    if word.text:
        raise word.error("too much on the line", "the end of the line")


def _check(stages: list[_Stage], rows: dict[int, _Row], end: _Word) -> None:
    """Check what has a place in the text; the rest is for Plan to check."""
    if not stages:
        raise end.error("no stage", "'stage 0 on device 0'")
    if not rows:
        raise end.error("no device row", "'device 0:' and its tasks")
    for device in range(len(rows)):
        if device not in rows:
            raise rows[max(rows)].word.error(f"row of device {device} missing", f"'{device}:' too")
    first: dict[str, _Word] = {}
    for stage in stages:
        if stage.device not in rows:
            raise stage.word.error("stage on a device without a row", f"0 to {len(rows) - 1}")
        if not stage.layers:
            raise stage.word.error("stage without layers", "an indented layer on the next line")
        for word in stage.layers:
            if word.text in first:
                raise word.error("layer twice", f"it only at {first[word.text].where}")
            first[word.text] = word
