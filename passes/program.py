"""The first IR: the jaxpr of a loss function, and what each of its inputs is."""

import dataclasses
from typing import Any

from passes import jaxprs
from passes.jaxprs import Jaxpr, Var


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A loss function at the shapes of one microbatch.

    Attributes:
      jaxpr: its inputs are the constants, then the parameters, then the batch; its results are the
        loss and, after it, the leaves of the auxiliary output.
      constants: values of the arrays that the function closes over.
      params: path of each parameter, such as `layers/0/mlp/kernel`.
      batch: path of each leaf of the batch.
      head_slices: parts of the vocabulary into which `slice_head` is to cut the head.
    """

    jaxpr: Jaxpr
    constants: tuple[Any, ...]
    params: tuple[str, ...]
    batch: tuple[str, ...]
    head_slices: int = 1

    def __post_init__(self) -> None:
        self.check()

    @property
    def constant_vars(self) -> list[Var]:
        return self.jaxpr.invars[: len(self.constants)]

    @property
    def param_vars(self) -> list[Var]:
        start = len(self.constants)
        return self.jaxpr.invars[start : start + len(self.params)]

    @property
    def batch_vars(self) -> list[Var]:
        return self.jaxpr.invars[len(self.constants) + len(self.params) :]

    def check(self) -> None:
        """Raise if the jaxpr is ill-typed or its inputs are not all accounted for."""
        named = len(self.constants) + len(self.params) + len(self.batch)
        assert named == len(self.jaxpr.invars), (named, len(self.jaxpr.invars))
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
