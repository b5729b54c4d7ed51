"""The table of passes/README.md and the code say the same."""

import importlib
import inspect
import pathlib
import re

import pytest

import passes
from passes import PROGRAM_PASSES, STAGE_PASSES

FOLDER = pathlib.Path(passes.__file__).parent
ARROWS = {
    "trace",
    "find_layers",
    "cut_stages",
    "hand_on",
    "differentiate",
    "split_backward",
    "split_values",
    "split_by_device",
    "layer_programs",
    "count_work",
}
ROW = re.compile(r"^\| `(\w+)` \(\[(\w+\.py)\]\((\w+\.py)\)\) \| (.+) \| (.+) \|$")


def rows():
    lines = (FOLDER / "README.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| `")]
    matches = [ROW.match(line) for line in table]
    assert all(matches), [line for line, m in zip(table, matches, strict=True) if not m]
    return [match.groups() for match in matches]


@pytest.mark.parametrize(("name", "file", "link"), [row[:3] for row in rows()])
def test_a_row_names_a_function_with_a_docstring(name, file, link):
    assert file == link
    module = importlib.import_module(f"passes.{file.removesuffix('.py')}")
    function = getattr(module, name)
    assert inspect.isfunction(function) and function.__doc__
    assert function.__module__ == module.__name__


def test_the_table_is_complete():
    names = [name for name, *_ in rows()]
    assert len(names) == len(set(names))
    listed = {a_pass.__name__ for a_pass in (*PROGRAM_PASSES, *STAGE_PASSES)}
    assert set(names) == listed | ARROWS


def test_passes_over_programs_are_in_their_order():
    names = [name for name, *_ in rows()]
    positions = [names.index(a_pass.__name__) for a_pass in PROGRAM_PASSES]
    assert positions == sorted(positions)
    assert names.index("trace") < positions[0]
    assert names.index("find_layers") > positions[-1]


def test_passes_over_stages_are_in_their_order():
    names = [name for name, *_ in rows()]
    positions = [names.index(a_pass.__name__) for a_pass in STAGE_PASSES]
    assert positions == sorted(positions)
    assert names.index("cut_stages") < positions[0]
    assert names.index("differentiate") > positions[-1]


def test_every_file_is_in_the_readme():
    text = (FOLDER / "README.md").read_text()
    files = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"\]\((\w+\.py)\)", text))
