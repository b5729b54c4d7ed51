"""The programs of the stages as one page for a browser: a table whose rows open to their HLO."""

import base64
import hashlib
import html
import pathlib
from collections.abc import Iterable, Sequence

from experiments.stage_hlo import Inspected, count, name_collectives
from jaxptis.pictures.words import duration, layer_names, percent, size

_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 14px 20px 40px; }
h1 { font-size: 20px; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid #8885; }
th { font-weight: 500; opacity: 0.75; vertical-align: bottom; }
.words { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.texts { text-align: left; padding-bottom: 14px; }
summary { cursor: pointer; }
pre {
  max-height: 70vh; max-width: 92vw; overflow: auto; padding: 8px 12px; border: 1px solid #8885;
  font-size: 12px;
}
"""

_COLUMNS = (
    *("flops", "of products", "accessed", "arguments", "results", "overwritten"),
    *("temporary", "collectives", "layers"),
)
_OP_COLUMNS = ("share", "at least", "flops", "accessed", "times", "op", "origin")
_WORDS = ("program", "op", "origin", "collectives", "layers")
_NOTE = (
    "Flops and what is accessed are counted by XLA, each loop as if it ran once; those of products "
    "and of ops are estimated from the HLO, loops as often as they run, where flops are of matrix "
    "products and convolutions. An op takes at least the time of its flops or of its bytes on the "
    "device (of a CPU nothing is known, so only the shares mean something)."
)


def save_page(path: str, found: Sequence[Inspected], *, title: str) -> None:
    """Writes the page, which needs no other file, no network and no script."""
    policy = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'sha256-{policy}'">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{_NOTE}</p>
<table>
{_head(("program", *_COLUMNS))}
{"".join(map(_program, found))}
</table>
</body>
</html>
"""
    pathlib.Path(path).write_text(page, encoding="utf-8")


def _program(each: Inspected) -> str:
    sizes = each.argument_bytes, each.output_bytes, each.overwritten_bytes, each.temporary_bytes
    figures = (
        count(each.flops),
        count(each.product_flops),
        size(round(each.bytes_accessed)),
        *map(size, sizes),
        name_collectives(each),
        layer_names(each.layers),
    )
    cells = _row(zip(("program", *_COLUMNS), (each.name, *figures), strict=True))
    inside = (
        f"as {each.same_as}"
        if each.same_as is not None
        else _details("costliest ops", _ops(each))
        + _details("optimized HLO", f"<pre>{html.escape(each.hlo)}</pre>")
        + _details("StableHLO", f"<pre>{html.escape(each.stablehlo)}</pre>")
    )
    return f'{cells}<tr><td class="texts" colspan="{len(_COLUMNS) + 1}">{inside}</td></tr>\n'


def _ops(each: Inspected) -> str:
    loops = f"<p>Loops that run nobody knows how often, counted once: {each.num_open_loops}</p>"
    rows = (
        (
            percent(costly.share),
            duration(costly.roofline_s),
            count(costly.op.flops),
            size(round(costly.op.bytes_accessed)),
            str(costly.op.times),
            costly.op.name,
            costly.op.origin,
        )
        for costly in each.costliest
    )
    table = "".join(_row(zip(_OP_COLUMNS, row, strict=True)) for row in rows)
    return f"{loops if each.num_open_loops else ''}<table>{_head(_OP_COLUMNS)}{table}</table>"


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{summary}</summary>{inside}</details>"


def _head(columns: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<th{_class(each)}>{each}</th>' for each in columns)}</tr>"


def _row(cells: Iterable[tuple[str, str]]) -> str:
    """Returns a row of texts, each with the column that it is in."""
    inside = (f"<td{_class(column)}>{html.escape(text)}</td>" for column, text in cells)
    return f"<tr>{''.join(inside)}</tr>"


def _class(column: str) -> str:
    return ' class="words"' if column in _WORDS else ""
