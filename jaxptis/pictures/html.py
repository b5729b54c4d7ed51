"""A timeline as one page for a browser, which needs nothing beside its file.

The folder `page` has the page's parts: template, style and scripts. Everything that a user named
goes in as JSON, and from there only through `textContent`; the page's policy allows no script but
ours and no connection.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import accumulate
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

from jaxptis.performance.timeline import Timeline
from jaxptis.pictures.bottleneck import find_bottleneck, say_memory
from jaxptis.pictures.colors import KIND_COLORS, KIND_WORDS, ink, shade
from jaxptis.pictures.facts import DeviceFacts, device_facts
from jaxptis.pictures.together import named
from jaxptis.plan import Plan, Task
from jaxptis.plan.order import needs

_SCRIPTS = (
    "data.js",
    "words.js",
    "layout.js",
    "boxes.js",
    "arrows.js",
    "draw.js",
    "tell.js",
    "steer.js",
    "tables.js",
)
# They could end the script element, or begin a comment or an entity.
_ESCAPES = {ord(each): f"\\u{ord(each):04x}" for each in "<>&"}

Json = dict[str, Any]


def save_html(
    path: str | PathLike[str],
    predicted: Timeline,
    *,
    measured: Timeline | None = None,
    plan: Plan | None = None,
    title: str = "",
) -> None:
    """Write the page; it opens from the file itself, without a network.

    Args:
        path: of the file.
        predicted: a timeline; a measured one, too, if it is alone.
        measured: what really ran; each device has its row under the predicted one.
        plan: names the layers.
        title: stands above.

    Raises:
        ValueError: the step takes no time, or the timelines and the plan are not of one pipeline.
    """
    title = title or "Timeline of a step"
    style = _read("page.css")
    script = "\n".join(map(_read, _SCRIPTS))
    page = Template(_read("page.html")).substitute(
        title=html.escape(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=to_json(page_data(predicted, measured, plan, title)),
    )
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def to_json(data: Json) -> str:
    """Return JSON in plain ASCII that may stand in a script element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def page_data(
    predicted: Timeline, measured: Timeline | None, plan: Plan | None, title: str
) -> Json:
    """Return all that the page shows."""
    given = named(predicted, measured, plan)
    return {
        "title": title,
        "kinds": [
            {"kind": kind, "words": KIND_WORDS[kind], "color": color, "ink": ink(color)}
            for kind, color in KIND_COLORS.items()
        ],
        "stages": _stages(given.values(), plan),
        "timelines": [_timeline(name, each, plan) for name, each in given.items()],
    }


def _stages(given: Iterable[Timeline], plan: Plan | None) -> list[Json]:
    """Return the layers of every stage, and the fill and the ink of its tasks by kind."""
    stages: dict[int, Json] = {}
    for timeline in given:
        for facts in device_facts(timeline):
            for chunk, stage in enumerate(facts.stages):
                colors = {kind: shade(kind, chunk, len(facts.stages)) for kind in KIND_COLORS}
                stages[stage] = {
                    "layers": plan.stages[stage].layers if plan else [],
                    "colors": {kind: [color, ink(color)] for kind, color in colors.items()},
                }
    return [stages.get(stage, {"layers": [], "colors": {}}) for stage in range(max(stages) + 1)]


def _timeline(name: str, timeline: Timeline, plan: Plan | None) -> Json:
    spans = [span for row in timeline.spans for span in sorted(row, key=lambda each: each.start_s)]
    index = {span.task: i for i, span in enumerate(spans)}
    bottleneck = find_bottleneck(timeline, plan)
    return {
        "name": name,
        "step_s": _short(timeline.step_s),
        "bottleneck": bottleneck.devices,
        "sentences": [each for each in (bottleneck.sentence, say_memory(timeline)) if each],
        "devices": [_device(facts) for facts in device_facts(timeline)],
        # The tasks of all devices, one device after the other; device i has first[i] to first[i+1].
        "first": list(accumulate(map(len, timeline.spans), initial=0)),
        "kind": "".join(span.task.kind for span in spans),
        "stage": [span.task.stage for span in spans],
        "microbatch": [span.task.microbatch for span in spans],
        "start_s": [_short(span.start_s) for span in spans],
        "end_s": [_short(span.end_s) for span in spans],
        "needs": [[index[each] for each in needs(span.task, index)] for span in spans],
        "transfers": _transfers(timeline, index),
    }


def _device(facts: DeviceFacts) -> Json:
    bubble, memory = facts.bubble, facts.memory
    return {
        "busy_s": _short(facts.busy_s),
        "kind_s": {kind: _short(seconds) for kind, seconds in facts.kind_s.items()},
        "stage_s": {stage: _short(seconds) for stage, seconds in facts.stage_s.items()},
        "warm_up_s": _short(bubble.warm_up_s),
        "steady_s": _short(bubble.steady_s),
        "cool_down_s": _short(bubble.cool_down_s),
        "hidden_s": _short(bubble.hidden_s),
        "exposed_s": _short(bubble.exposed_s),
        "memory": memory
        and {
            "times_s": list(map(_short, memory.times_s)),
            "num_bytes": memory.num_bytes,
            "peak_bytes": memory.peak_bytes,
            "peak_s": _short(memory.peak_s),
            "parts": dict(memory.peak_parts),
        },
    }


def _transfers(timeline: Timeline, index: dict[Task, int]) -> Json:
    transfers: Sequence = sorted(timeline.transfers, key=lambda each: each.start_s)
    return {
        "source": [each.source for each in transfers],
        "target": [each.target for each in transfers],
        "made_by": [index[each.made_by] for each in transfers],
        "reader": [each.reader for each in transfers],
        "start_s": [_short(each.start_s) for each in transfers],
        "end_s": [_short(each.end_s) for each in transfers],
        "num_bytes": [each.num_bytes for each in transfers],
    }


def _short(seconds: float) -> float:
    """Leave out what no one sees: nine digits place a task of a step to a billionth of it."""
    return float(f"{seconds:.9g}")


def _read(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
