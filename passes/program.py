"""The first IR: the jaxpr of a loss function, and what each of its inputs is."""

import dataclasses
from typing import Any

import jax

from passes import jaxprs
from passes.boxes import Box, Pieces, index_text, sizes
from passes.jaxprs import Jaxpr, Var


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a parameter of a program is: a leaf of the user's parameters, or a part of one.

    Attributes:
      leaf: index among the leaves of the user's parameters.
      path: of the leaf, such as `layers/0/mlp/kernel`.
      shape: of the leaf.
      box: which part of the leaf; all of it, or what a pass has cut out.
    """

    leaf: int
    path: str
    shape: tuple[int, ...]
    box: Box

    @property
    def index(self) -> str:
        """The part as an index, such as `[4]` or `[:,0:64]`; empty for a whole leaf."""
        return index_text(self.box, self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A loss function at the shapes of one microbatch.

    Attributes:
      jaxpr: its inputs are the constants, then the parameters, then the batch; its results are the
        loss and, after it, the leaves of the auxiliary output.
      constants: values of the arrays that the function closes over.
      sources: which of the user's parameters, or which part of one, each parameter is. The parts
        of a leaf stand together and make up the whole; they come from cuts all the way through.
      batch: path of each leaf of the batch.
      head_slices: parts of the vocabulary into which `slice_head` is to cut the head.
    """

    jaxpr: Jaxpr
    constants: tuple[Any, ...]
    sources: tuple[Source, ...]
    batch: tuple[str, ...]
    head_slices: int = 1

    def __post_init__(self) -> None:
        self.check()

    @property
    def params(self) -> tuple[str, ...]:
        """The name of each parameter: its path, with an index behind that of a part."""
        return tuple(source.path + source.index for source in self.sources)

    @property
    def leaves(self) -> tuple[tuple[int, ...], ...]:
        """The parameters that are parts of each of the user's leaves."""
        parts: dict[int, list[int]] = {}
        for p, source in enumerate(self.sources):
            parts.setdefault(source.leaf, []).append(p)
        return tuple(map(tuple, parts.values()))

    @property
    def pieces(self) -> tuple[Pieces, ...]:
        """The boxes of these parts; a single one for a leaf that is whole."""
        return tuple(tuple(self.sources[p].box for p in parts) for parts in self.leaves)

    @property
    def leaf_avals(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The types of the user's leaves."""
        avals = jaxprs.avals(self.param_vars)
        return tuple(
            jax.ShapeDtypeStruct(self.sources[p].shape, avals[p].dtype) for p, *_ in self.leaves
        )

    @property
    def constant_vars(self) -> list[Var]:
        return self.jaxpr.invars[: len(self.constants)]

    @property
    def param_vars(self) -> list[Var]:
        start = len(self.constants)
        return self.jaxpr.invars[start : start + len(self.sources)]

    @property
    def batch_vars(self) -> list[Var]:
        return self.jaxpr.invars[len(self.constants) + len(self.sources) :]

    def check(self) -> None:
        """Raise if the jaxpr is ill-typed or its inputs are not all accounted for."""
        named = len(self.constants) + len(self.sources) + len(self.batch)
        assert named == len(self.jaxpr.invars), (named, len(self.jaxpr.invars))
        shapes = [aval.shape for aval in jaxprs.avals(self.param_vars)]
        assert shapes == [sizes(source.box) for source in self.sources], shapes
        jaxprs.check(self.jaxpr)

    def text(self) -> str:
        """Return the inputs, a line each, and the jaxpr."""
        lines = [f"constant {v.aval.str_short()}" for v in self.constant_vars]
        for role, paths, variables in (
            ("parameter", self.params, self.param_vars),
            ("batch", self.batch, self.batch_vars),
        ):
            lines += [
                f"{role} {path} {v.aval.str_short()}"
                for path, v in zip(paths, variables, strict=True)
            ]
        return "\n".join([*lines, "", str(self.jaxpr), ""])
