import json
import re
from dataclasses import fields, replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptis.performance import Costs, LayerCost, costs_file
from jaxptis.performance.costs import TiedParams
from jaxptis.performance.costs_file import from_json, to_json

SECONDS = ("forward_s", "backward_s", "input_grad_s", "weight_grad_s")
BYTES = [each.name for each in fields(LayerCost) if each.name.endswith("_bytes")]

_seconds = st.floats(0, 1e3)
_bytes = st.integers(0, 2**60)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).filter(lambda x: abs(x) < inf),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def _costs(draw: st.DrawFn) -> Costs:
    """Draw costs of layers of few kinds, so that some are equal."""
    numbers: dict[str, Any] = dict.fromkeys((*SECONDS, "recompute_s", "spread"), _seconds)
    numbers |= dict.fromkeys(BYTES, _bytes)
    kinds = draw(st.lists(st.fixed_dictionaries(numbers), min_size=1, max_size=3))
    names = draw(st.lists(st.text(), min_size=1, max_size=8, unique=True))
    layers = tuple(LayerCost(name=name, **draw(st.sampled_from(kinds))) for name in names)
    tied = st.builds(
        TiedParams,
        layers=st.lists(st.sampled_from(names), unique=True).map(tuple),
        param_bytes=_bytes,
        grad_bytes=_bytes,
        state_bytes=_bytes,
    )
    return Costs(
        layers,
        tied=tuple(draw(st.lists(tied, max_size=2))),
        start_s=draw(_seconds),
        source=draw(st.sampled_from(["estimated", "measured", "given"])),
        device=draw(st.text()),
        settings=draw(st.dictionaries(st.text(), _json, max_size=3)),
    )


@given(_costs())
def test_what_is_written_is_read(costs: Costs) -> None:
    text = to_json(costs)
    assert from_json(text) == costs
    assert len(json.loads(text)["kinds"]) == len({replace(each, name="") for each in costs.layers})


def test_files(tmp_path: Path) -> None:
    costs = from_json(json.dumps(_good()))
    costs.save(tmp_path / "costs.json")
    assert Costs.load(tmp_path / "costs.json") == Costs.load(str(tmp_path / "costs.json")) == costs
    text = (tmp_path / "costs.json").read_text()
    (tmp_path / "marked.json").write_text(text, encoding="utf-8-sig")
    assert Costs.load(tmp_path / "marked.json") == costs
    with pytest.raises(FileNotFoundError):
        Costs.load(tmp_path / "gone.json")


def test_the_example_of_the_documentation_is_read() -> None:
    text = re.search(r"^    \{\n.*^    \}$", str(costs_file.__doc__), re.MULTILINE | re.DOTALL)
    assert text is not None
    costs = from_json(text[0])
    assert [each.name for each in costs.layers] == ["embed", "layers_0/mlp", "layers_1/mlp", "head"]
    assert costs.task_s(range(1, 3), "F") == 2e-05 + 0.002 + 0.002
    assert costs.task_s(range(1, 3), "B", "all") == pytest.approx(0.01062)
    assert costs.layers[1].saved_bytes == 270532608
    assert costs.layers[1].kept_bytes == 0
    assert costs.tied[0].layers == ("embed", "head")
    assert (costs.source, costs.device) == ("given", "NVIDIA H200")
    assert costs.settings == {"sequence_length": 4096}


def test_equal_layers_are_one_kind_with_a_name() -> None:
    given: dict[str, Any] = {"backward_s": 2.0, "input_grad_s": 1.0, "weight_grad_s": 1.0}

    def layer(name: str, forward_s: float) -> LayerCost:
        return LayerCost(name=name, forward_s=forward_s, **given)

    costs = Costs(
        (
            layer("block_1/mlp", 1.0),
            layer("block_2/mlp", 2.0),
            layer("block_3/mlp", 1.0),
            layer("block_4/mlp", 2.0),
            layer("block_5/mlp", 3.0),
        )
    )
    assert {kind: [each.name for each in layers] for kind, layers in costs.kinds.items()} == {
        "block_*/mlp": ["block_1/mlp", "block_3/mlp"],
        "block_*/mlp#2": ["block_2/mlp", "block_4/mlp"],
        "block_5/mlp": ["block_5/mlp"],
    }


def _good() -> dict[str, Any]:
    times = dict.fromkeys(SECONDS, 1.0)
    return {
        "kinds": {"thin": {**times, "saved_bytes": 8}, "thick": times},
        "layers": {"a": "thin", "b": "thick", "c": "thin"},
        "tied": [{"layers": ["a", "c"], "param_bytes": 4, "grad_bytes": 4}],
    }


def _refuse(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^mine.json:{message}"):
        from_json(text, source="mine.json")


@pytest.mark.parametrize("name", [*SECONDS, "recompute_s", *BYTES, "spread"])
@pytest.mark.parametrize("number", [-1, nan, inf, -inf, "1", None, True, [1], 10**400])
def test_bad_numbers(name: str, number: Any) -> None:
    costs = _good()
    costs["kinds"]["thick"][name] = number
    found = re.escape(repr(number))
    _refuse(json.dumps(costs), f" {name} of kind 'thick' is {found}; use finite .* of 0 or more")


@pytest.mark.parametrize("name", ["param_bytes", "grad_bytes", "state_bytes"])
@pytest.mark.parametrize("number", [-1, nan, "1"])
def test_bad_numbers_of_what_is_shared(name: str, number: Any) -> None:
    costs = _good()
    costs["tied"][0][name] = number
    _refuse(
        json.dumps(costs), rf" {name} of tied\[0\] is {number!r}; use finite bytes of 0 or more"
    )


def test_bytes_are_whole() -> None:
    costs = _good()
    costs["kinds"]["thin"]["saved_bytes"] = 1.5
    _refuse(json.dumps(costs), " saved_bytes of kind 'thin' is 1.5; use whole bytes")
    costs["kinds"]["thin"]["saved_bytes"] = 1e9
    saved_bytes = from_json(json.dumps(costs)).layers[0].saved_bytes
    assert (saved_bytes, type(saved_bytes)) == (10**9, int)


@pytest.mark.parametrize("name", SECONDS)
def test_missing_seconds(name: str) -> None:
    costs = _good()
    del costs["kinds"]["thin"][name]
    _refuse(json.dumps(costs), f" kind 'thin' has no '{name}'; add it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": {}}, "the file has 'layer', which means nothing here; did you mean 'layers'"),
        ({"kinds": []}, r"kinds is \[\]; use an object, \{\.\.\.\}"),
        ({"kinds": {}}, r"layer 'a' is of kind 'thin', but there are only the kinds \(none\)"),
        ({"kinds": {"thin": 3}}, r"kind 'thin' is 3; use an object"),
        ({"layers": ["thin"]}, r"layers is \['thin'\]; use an object"),
        ({"layers": {}}, '"layers" is empty; give every layer of the model its kind'),
        (
            {"layers": {"a": "thin", "b": "thicc"}},
            "layer 'b' is of kind 'thicc', but there are only the kinds 'thin', 'thick'; did you "
            r"mean 'thick'\? correct it or add the kind",
        ),
        ({"layers": {"a": ["thin"]}}, r"layer 'a' is of kind \['thin'\], but there are only"),
        ({"tied": {}}, r"tied is \{\}; use a list"),
        ({"tied": [3]}, r"tied\[0\] is 3; use an object"),
        ({"tied": [{"param_bytes": 1, "grad_bytes": 1}]}, r"tied\[0\] has no 'layers'; add it"),
        ({"tied": [{"layers": ["a", "c"], "param_bytes": 1}]}, r"tied\[0\] has no 'grad_bytes'"),
        ({"tied": [{"layers": "ac", "param_bytes": 1, "grad_bytes": 1}]}, "layers of .* is 'ac'"),
        (
            {"tied": [{"layers": ["a", "d"], "param_bytes": 1, "grad_bytes": 1}]},
            "a, d share parameters, but there are no costs of 'd'; correct the name or add",
        ),
        ({"start_s": -1}, "start_s of the costs is -1; use finite seconds of 0 or more"),
        ({"source": "guessed"}, "the source of costs is 'guessed'; use one of estimated,"),
        ({"device": 3}, "device is 3; use the name of a kind of device"),
        ({"settings": [3]}, r"settings is \[3\]; use an object"),
    ],
)
def test_bad_forms(change: dict[str, Any], message: str) -> None:
    _refuse(json.dumps({**_good(), **change}), f" {message}")


@pytest.mark.parametrize("name", ["kinds", "layers"])
def test_missing_parts(name: str) -> None:
    costs = _good()
    del costs[name]
    _refuse(json.dumps(costs), f" the file has no '{name}'; add it")


def test_unknown_numbers() -> None:
    costs = _good()
    costs["kinds"]["thin"]["forwards_s"] = 1.0
    _refuse(
        json.dumps(costs),
        " kind 'thin' has 'forwards_s', which means nothing here; did you mean 'forward_s'",
    )


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ('"saved_bytes": 8', "kind 'thin': 'saved_bytes' stands there twice; remove one"),
        ('"a": "thin"', "layers: 'a' stands there twice; remove one"),
        ('"param_bytes": 4', r"tied\[0\]: 'param_bytes' stands there twice; remove one"),
    ],
)
def test_what_stands_there_twice(first: str, message: str) -> None:
    text = json.dumps(_good())
    assert text.count(first) == 1
    _refuse(text.replace(first, f"{first}, {first}"), f" {message}")


def test_no_json(tmp_path: Path) -> None:
    _refuse('{"kinds": {},\n "layers" {}}', r"2:11: this is no JSON \(.*\); correct it, or write")
    _refuse("[]", r" the file is \[\]; use an object")
    path = tmp_path / "bytes.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"bytes\.json: this is no text .*; save it in UTF-8"):
        Costs.load(path)


@pytest.mark.parametrize("value", [nan, {1, 2}, object()])
def test_settings_that_json_does_not_have(value: Any) -> None:
    costs = replace(from_json(json.dumps(_good())), settings={"it": value})
    with pytest.raises(ValueError, match=r"the settings \{'it': .* cannot be written .*; use what"):
        to_json(costs)
