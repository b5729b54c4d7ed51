"""The JSON form of costs: a person can write it by hand.

Layers of equal costs are of one kind. "kinds" has the numbers of each, those of `LayerCost`: the
four seconds of a kind must be there, anything else is 0 if it is left out. "layers" says of which
kind each layer is, in the order of the model. The rest may be left out: "tied", what several layers
share, with the numbers of `TiedParams`; and "start_s", "source", "device" and "settings", as in
`Costs`. Of a model at hand "skipping_bytes" are looked up, whatever the file says.

    {
     "device": "NVIDIA H200",
     "start_s": 2e-05,
     "kinds": {
      "embed": {
       "forward_s": 0.0001, "backward_s": 0.0003, "input_grad_s": 0, "weight_grad_s": 0.0003
      },
      "mlp": {
       "forward_s": 0.002, "backward_s": 0.004, "input_grad_s": 0.002, "weight_grad_s": 0.002,
       "recompute_s": 0.0013, "input_bytes": 33554432, "saved_bytes": 270532608,
       "param_bytes": 541065216, "grad_bytes": 541065216, "state_bytes": 1082130432
      },
      "head": {
       "forward_s": 0.003, "backward_s": 0.006, "input_grad_s": 0.003, "weight_grad_s": 0.003,
       "input_bytes": 33554432
      }
     },
     "layers": {"embed": "embed", "layers_0/mlp": "mlp", "layers_1/mlp": "mlp", "head": "head"},
     "tied": [{"layers": ["embed", "head"], "param_bytes": 524288000, "grad_bytes": 524288000}],
     "settings": {"sequence_length": 4096}
    }
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

from jaxptis.performance.costs import Costs, LayerCost, TiedParams, check_number

_NAMES = ("kinds", "layers", "tied", "start_s", "source", "device", "settings")


def to_json(costs: Costs) -> str:
    """Write costs in the form that `from_json` reads, equal layers as one kind.

    Raises:
        ValueError: the settings have no form in JSON.
    """
    kinds = costs.kinds
    kind_of = {layer.name: kind for kind, layers in kinds.items() for layer in layers}
    written = {
        "source": costs.source,
        "device": costs.device,
        "settings": dict(costs.settings),
        "start_s": costs.start_s,
        "kinds": {kind: _without_zeros(layers[0]) for kind, layers in kinds.items()},
        "layers": {layer.name: kind_of[layer.name] for layer in costs.layers},
        "tied": [{"layers": list(tied.layers), **_without_zeros(tied)} for tied in costs.tied],
    }
    try:
        return json.dumps(written, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the settings {dict(costs.settings)} cannot be written ({error}); use what JSON has: "
            "strings, finite numbers, lists, objects"
        ) from error


def from_json(text: str, source: str = "costs") -> Costs:
    """Read costs.

    Args:
        text: what `to_json` wrote, or a person.
        source: stands in front of every error: the path of the file, where there is one.

    Raises:
        ValueError: `source:` the layer, kind or field, what is wrong with it, what to change.
    """
    try:
        return _read(json.loads(text, object_pairs_hook=_Object))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}:{error.lineno}:{error.colno}: this is no JSON ({error.msg}); correct it, or "
            "write the file with costs.save(path)"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


class _Object(dict[str, Any]):
    """An object of JSON, which remembers a name that stands in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = (
            [name for name in self if names.count(name) > 1] if len(self) < len(names) else []
        )


def _without_zeros(cost: LayerCost | TiedParams) -> dict[str, float]:
    """Return the numbers of `cost`; those that may be left out are, if they are 0."""
    numbers = {name: getattr(cost, name) for name in _numbers(type(cost))}
    required = _required(type(cost))
    return {name: number for name, number in numbers.items() if number or name in required}


def _numbers(cost: type[LayerCost] | type[TiedParams]) -> list[str]:
    return [each.name for each in fields(cost) if each.name not in ("name", "layers")]


def _required(cost: type[LayerCost] | type[TiedParams]) -> list[str]:
    without_default = {each.name for each in fields(cost) if each.default is MISSING}
    return [name for name in _numbers(cost) if name in without_default]


def _read(value: Any) -> Costs:
    given = _read_object(value, "the file", known=_NAMES, required=("kinds", "layers"))
    kinds = {
        name: _read_cost(numbers, f"kind {name!r}", LayerCost)
        for name, numbers in _read_object(given.pop("kinds"), "kinds").items()
    }
    layers = _read_object(given.pop("layers"), "layers")
    if not layers:
        raise ValueError('"layers" is empty; give every layer of the model its kind')
    tied = given.pop("tied", [])
    if not isinstance(tied, list):
        raise ValueError(f"tied is {tied!r}; use a list, [...]")
    if "settings" in given:
        given["settings"] = _read_object(given["settings"], "settings")
    if not isinstance(given.get("device", ""), str):
        raise ValueError(f"device is {given['device']!r}; use the name of a kind of device")
    return Costs(
        tuple(LayerCost(name=name, **_kind_of(name, kind, kinds)) for name, kind in layers.items()),
        tied=tuple(_read_tied(each, f"tied[{k}]") for k, each in enumerate(tied)),
        **given,
    )


def _kind_of(name: str, kind: Any, kinds: Mapping[str, Any]) -> Any:
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"layer {name!r} is of kind {kind!r}, but there are only the kinds "
            f"{', '.join(map(repr, kinds)) or '(none)'}; {_hint(kind, kinds)}correct it or add the "
            "kind"
        )
    return kinds[kind]


def _read_tied(value: Any, where: str) -> TiedParams:
    given = _read_cost(value, where, TiedParams, also=("layers",))
    layers = given.pop("layers")
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"layers of {where} is {layers!r}; use a list of names of layers")
    return TiedParams(layers=tuple(layers), **given)


def _read_cost(
    value: Any,
    where: str,
    cost: type[LayerCost] | type[TiedParams],
    also: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read an object that has the numbers of `cost`, which are checked, and perhaps more."""
    known, required = (*also, *_numbers(cost)), (*also, *_required(cost))
    given = _read_object(value, where, known=known, required=required)
    for name in [name for name in given if name not in also]:
        check_number(name, given[name], where)
        if name.endswith("_bytes"):
            if given[name] != int(given[name]):
                raise ValueError(f"{name} of {where} is {given[name]}; use whole bytes")
            given[name] = int(given[name])
    return given


def _read_object(
    value: Any,
    where: str,
    *,
    known: Iterable[str] | None = None,
    required: Iterable[str] = (),
) -> dict[str, Any]:
    if not isinstance(value, _Object):
        raise ValueError(f"{where} is {value!r}; use an object, {{...}}")
    for name in value.twice:
        raise ValueError(f"{where}: {name!r} stands there twice; remove one")
    for name in value:
        if known is not None and name not in known:
            raise ValueError(
                f"{where} has {name!r}, which means nothing here; {_hint(name, known)}use only "
                f"{', '.join(known)}"
            )
    for name in required:
        if name not in value:
            raise ValueError(f"{where} has no {name!r}; add it")
    return dict(value)


def _hint(name: Any, known: Iterable[str]) -> str:
    close = get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""
