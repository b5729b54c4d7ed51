"""What every layer costs of a device's time and memory, and what a device needs for given work."""

import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from jaxptis.cluster import DeviceSpec
from jaxptis.plan.plan import Recompute

Source = Literal["estimated", "measured", "given"]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What a layer takes for one microbatch, and what lasts of it.

    Seconds are those of a stage that recomputes what is cheap, as stages do unless told otherwise.

    Attributes:
        name: the layer's.
        forward_s: of a forward, F.
        backward_s: of a whole backward, B: its own figure, since splitting may have a price.
        input_grad_s: of the input gradient of a split backward, I; 0 for the first layer of a
            model, which reads the batch. The stage that has it makes no input gradient: its I does
            nothing, and its W is the whole backward.
        weight_grad_s: of the weight gradient of a split backward, W.
        recompute_s: what B or I takes more in a stage that recomputes all.
        input_bytes: of what it reads of the layers before; its gradient takes as many.
        skipping_bytes: of what layers after it read of those before, but not it, without scalars:
            where a stage begins with this layer, that is handed on through it. Its gradient, if it
            has one, takes as many.
        saved_bytes: what the forward saves for the backward, its input not counted.
        saved_all_bytes: likewise, in a stage that recomputes nothing.
        kept_bytes: all that lasts from I to W: what I keeps, and what W reads of what was saved, of
            the input and of the gradient that came.
        made_bytes: how much more there is while I runs: what it keeps and the gradient of the
            input, as far as they do not take the place of something that W does not read.
        param_bytes: of the parameters that no other layer reads.
        grad_bytes: of the sums of their gradients.
        state_bytes: of the optimizer's state of them.
        forward_temporary_bytes: the most that F needs beside all this while it runs.
        backward_temporary_bytes: likewise, of B.
        input_grad_temporary_bytes: likewise, of I.
        weight_grad_temporary_bytes: likewise, of W.
        backward_held_bytes: what B of several layers holds of this one to its end, where XLA leaves
            the gradients of weights.
        input_grad_held_bytes: what I of several layers holds of this one to its end, where XLA
            leaves what is cheap of that which it keeps.
        spread: the interquartile range over the median of measured seconds, the largest of its
            programs.

    Raises:
        ValueError: a number is negative or not finite.
    """

    name: str
    forward_s: float
    backward_s: float
    input_grad_s: float
    weight_grad_s: float
    recompute_s: float = 0.0
    input_bytes: int = 0
    skipping_bytes: int = 0
    saved_bytes: int = 0
    saved_all_bytes: int = 0
    kept_bytes: int = 0
    made_bytes: int = 0
    param_bytes: int = 0
    grad_bytes: int = 0
    state_bytes: int = 0
    forward_temporary_bytes: int = 0
    backward_temporary_bytes: int = 0
    input_grad_temporary_bytes: int = 0
    weight_grad_temporary_bytes: int = 0
    backward_held_bytes: int = 0
    input_grad_held_bytes: int = 0
    spread: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "name":
                check_number(each.name, getattr(self, each.name), f"layer {self.name!r}")

    @property
    def crossing_bytes(self) -> int:
        """What comes to a stage that begins with this layer from the stage before."""
        return self.input_bytes + self.skipping_bytes


@dataclass(frozen=True, kw_only=True)
class TiedParams:
    """Parameters that several layers read, such as a tied embedding: once on each of their devices.

    The optimizer's state of them is on the device of the first layer alone.

    Attributes:
        layers: the names of the layers.
        param_bytes: of the parameters.
        grad_bytes: of the sums of their gradients.
        state_bytes: of the optimizer's state of them.

    Raises:
        ValueError: a number is negative or not finite.
    """

    layers: tuple[str, ...]
    param_bytes: int
    grad_bytes: int
    state_bytes: int = 0

    def __post_init__(self) -> None:
        for name in "param_bytes", "grad_bytes", "state_bytes":
            check_number(name, getattr(self, name), f"what {', '.join(self.layers)} share")


@dataclass(frozen=True)
class Costs:
    """The costs of all layers in the order of the model.

    Attributes:
        layers: of every layer.
        tied: parameters that several layers read.
        start_s: seconds that every task takes beside its layers, to start its program.
        source: "estimated" from XLA's counts, "measured" on a device, or "given".
        device: the kind of device that the seconds are of.
        settings: what else they depend on (model, sequence length, dtype, ...), for people.

    Raises:
        ValueError: two layers have one name, or tied parameters are of a layer that is not there.
    """

    layers: tuple[LayerCost, ...]
    tied: tuple[TiedParams, ...] = ()
    start_s: float = 0.0
    source: Source = "given"
    device: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two layers are called {name!r}; give each a name of its own")
        for tied in self.tied:
            for name in tied.layers:
                if name not in names:
                    raise ValueError(
                        f"{', '.join(tied.layers)} share parameters, but there are no costs "
                        f"of {name!r}; correct the name or add the layer"
                    )
        if self.source not in get_args(Source):
            raise ValueError(
                f"the source of costs is {self.source!r}; use one of {', '.join(get_args(Source))}"
            )
        check_number("start_s", self.start_s, "the costs")

    @property
    def kinds(self) -> dict[str, tuple[LayerCost, ...]]:
        """Layers of equal costs, by what their names have in common."""
        equal: dict[LayerCost, list[LayerCost]] = {}
        for layer in self.layers:
            equal.setdefault(replace(layer, name=""), []).append(layer)
        kinds: dict[str, tuple[LayerCost, ...]] = {}
        for layers in equal.values():
            first = layers[0].name
            common = re.sub("[0-9]+", "*", first) if len(layers) > 1 else first
            names = itertools.chain([common], (f"{common}#{n}" for n in itertools.count(2)))
            kinds[next(name for name in names if name not in kinds)] = tuple(layers)
        return kinds

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Costs":
        """Read a file that `save` or a person wrote; see `jaxptis.performance.costs_file`.

        Raises:
            ValueError: says where the file is wrong, and what to change.
        """
        from jaxptis.performance.costs_file import from_json  # costs_file.py imports Costs

        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # some editors write a mark in front
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: this is no text ({error}); save it in UTF-8") from error
        return from_json(text, source=str(path))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file in JSON, which `load` reads."""
        from jaxptis.performance.costs_file import to_json

        Path(path).write_text(to_json(self), encoding="utf-8")

    def task_s(self, stage_layers: range, kind: str, recompute: Recompute = "cheap") -> float:
        """Return the seconds of one task of a stage that holds the layers of these indices.

        In a stage without an input gradient, I takes none; see `LayerCost`.

        Raises:
            ValueError: `kind` is not F, B, I or W.
        """
        layers = [self.layers[index] for index in stage_layers]
        again_s = sum(layer.recompute_s for layer in layers) if recompute == "all" else 0.0
        match kind:
            case "F":
                return self.start_s + sum(layer.forward_s for layer in layers)
            case "B":
                return self.start_s + again_s + sum(layer.backward_s for layer in layers)
            case "I" if self.makes_input_grad(stage_layers):
                return self.start_s + again_s + sum(layer.input_grad_s for layer in layers)
            case "I":
                return 0.0
            case "W" if self.makes_input_grad(stage_layers):
                return self.start_s + sum(layer.weight_grad_s for layer in layers)
            case "W":
                return self.task_s(stage_layers, "B", recompute)
        raise ValueError(f"task kind {kind!r} is not known; use one of F, B, I, W")

    def makes_input_grad(self, stage_layers: range) -> bool:
        """Whether a stage that holds these layers reads what has a gradient."""
        return stage_layers.start > 0 or self.layers[0].input_grad_s > 0

    def saved_bytes(self, stage_layers: range, recompute: Recompute = "cheap") -> int:
        """Return what a forward of a stage saves for its backward, beside the stage's input.

        The input of a layer inside of the stage is saved like what the layer itself saves.
        """
        if recompute == "all":
            return 0
        layers = [self.layers[index] for index in stage_layers]
        inside = sum(layer.input_bytes for layer in layers[1:])
        if recompute == "none":
            return inside + sum(layer.saved_all_bytes for layer in layers)
        return inside + sum(layer.saved_bytes for layer in layers)

    def temporary_bytes(
        self, stage_layers: range, kind: str, recompute: Recompute = "cheap"
    ) -> int:
        """Return what one task of a stage needs while it runs, beside what lasts.

        A backward goes from the last layer to the first, and holds something of each to its end.
        Where the stage recomputes all, what is saved otherwise is a temporary of B or I.

        Raises:
            ValueError: `kind` is not F, B, I or W.
        """
        layers = [self.layers[index] for index in reversed(stage_layers)]
        again = self.saved_bytes(stage_layers) if recompute == "all" else 0
        match kind:
            case "F":
                return max(layer.forward_temporary_bytes for layer in layers)
            case "B":
                return again + _most(
                    (layer.backward_temporary_bytes, layer.backward_held_bytes) for layer in layers
                )
            case "I" if self.makes_input_grad(stage_layers):
                return again + _most(
                    (layer.input_grad_temporary_bytes, layer.input_grad_held_bytes)
                    for layer in layers
                )
            case "I":
                return 0
            case "W" if self.makes_input_grad(stage_layers):
                return max(layer.weight_grad_temporary_bytes for layer in layers)
            case "W":
                return self.temporary_bytes(stage_layers, "B", recompute)
        raise ValueError(f"task kind {kind!r} is not known; use one of F, B, I, W")


def _most(layers: Iterable[tuple[int, int]]) -> int:
    """Return the most that layers in turn need, each with what those before it hold."""
    most = held = 0
    for needs, holds in layers:
        most = max(most, needs + held)
        held += holds
    return most


def check_number(name: str, value: Any, owner: str) -> None:
    """Raise a ValueError that names the owner unless a cost is a finite number of 0 or more."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= sys.float_info.max):
        unit = {"s": "seconds", "bytes": "bytes"}.get(name.rpartition("_")[2], "numbers")
        raise ValueError(f"{name} of {owner} is {value!r}; use finite {unit} of 0 or more")


def roofline_s(flops: float, bytes_accessed: float, device: DeviceSpec) -> float:
    """Return the seconds that work takes at least: to compute it, or to move its bytes.

    The roofline model of Williams, Waterman and Patterson (Communications of the ACM 52(4), 2009).
    """
    return max(flops / device.flops_per_s, bytes_accessed / device.bytes_per_s)
