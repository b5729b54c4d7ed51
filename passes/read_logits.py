"""Run what stands behind a matmul without ever making its whole result.

The matmul's result, and what is computed from it elementwise, is known by how a part of it along
the vocabulary is computed. Beside that it may have a shift that is equal along the vocabulary:
log_softmax subtracts the maximum, and then the log of a sum. Such a value may be reduced along the
vocabulary, and what comes of that is an ordinary value again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Var
from passes.reductions import (
    Reduction,
    Take,
    at_least_float32,
    finite,
    pick_constant,
    pick_of,
    softmax_of,
    sum_of,
)
from passes.slice_values import Part, bind, result_axis

# f(z + shift) = f(z) + f(shift), unless a conversion of type loses digits
_LINEAR = frozenset(
    "neg convert_element_type broadcast_in_dim reshape slice squeeze transpose copy".split()  # noqa: SIM905
)


class NotAHead(Exception):
    """Something other than a softmax cross-entropy reads the result of a matmul."""


class Values(dict[Var, Any]):
    """The values of a jaxpr; those that nothing has computed yet are when they are read."""

    def __init__(self, jaxpr: Jaxpr, args: Sequence[Any]) -> None:
        super().__init__(zip(jaxpr.invars, args, strict=False))
        self.jaxpr = jaxpr
        self.producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self._read = jaxprs.read_vars(jaxpr)

    def __missing__(self, v: Var) -> Any:
        missing = jaxprs.backward_slice(self.jaxpr, invars=list(self), outvars=[v])
        self.run(missing.eqns)
        return self[v]

    def of(self, atom: Var | Literal) -> Any:
        return self[atom] if isinstance(atom, Var) else atom.val

    def run(self, eqns: Sequence[JaxprEqn]) -> None:
        """Compute the results of consecutive equations."""
        made = {v: None for eqn in eqns for v in eqn.outvars if v in self._read}
        read = dict.fromkeys(v for eqn in eqns for v in jaxprs.reads(eqn))
        given = [v for v in read if v not in made]
        body = jaxprs.rebuild(self.jaxpr, invars=given, outvars=list(made), eqns=eqns)
        results = jaxprs.evaluate(body, [self[v] for v in given])
        self.update(zip(made, results, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide:
    """A value with the vocabulary as an axis: (z + shift) * weight, or exp(z + shift).

    Attributes:
      axis: that of the vocabulary.
      take: computes a part of z.
      shift: an array of size 1 along the axis, in at least float32, since it is often nearly -z;
        None for zero.
      weight: computes a part of it; None for one.
      is_exp: whether the exponential is taken.
    """

    axis: int
    take: Take
    shift: Any = None
    weight: Take | None = None
    is_exp: bool = False

    @property
    def is_sum(self) -> bool:
        return self.weight is None and not self.is_exp

    @property
    def is_plain(self) -> bool:
        return self.is_sum and self.shift is None

    @property
    def negated(self) -> "Wide":
        """Minus the value, which must be a sum."""
        shift = None if self.shift is None else -self.shift
        return dataclasses.replace(self, take=lambda part: -self.take(part), shift=shift)


class LogitsReader:
    """Runs the equations behind a matmul.

    Attributes:
      reductions: along the vocabulary, in the order in which they are met.
      has_softmax: whether a sum of exponentials has been met.
    """

    def __init__(self, logits: Var, axis: int, values: Values, reduced: Sequence[Any] | None):
        """Take the result of a matmul and the values that are known before it.

        Args:
          logits: the result.
          axis: which of its axes is the vocabulary.
          values: computes what does not depend on the result.
          reduced: what each reduction gives; if None, it is computed along the whole vocabulary.
        """
        self.reductions: list[Reduction] = []
        self.has_softmax = False
        self._jaxpr = values.jaxpr
        self._values = values
        self._reduced = reduced
        self._behind = jaxprs.dependents(values.jaxpr, [logits])
        self._size = _shape(logits)[axis]
        self._whole = Part(values.producers, values, 0, self._size)
        self._softmaxes: dict[Take, Any] = {}
        self._wide = {logits: Wide(axis=axis, take=lambda part: part.of(logits, axis))}

    def run(self) -> list[Any]:
        """Return the results of the jaxpr.

        Raises:
          NotAHead: an equation needs all the logits at once, or they are returned.
        """
        for eqn in self._jaxpr.eqns:
            if any(v in self._wide for v in jaxprs.reads(eqn)):
                self._step(eqn)
            elif not self._behind.isdisjoint(jaxprs.reads(eqn)):
                self._values.run([eqn])
        if any(self._wide_of(v) for v in self._jaxpr.outvars):
            raise NotAHead("the loss function returns it")
        return [self._values.of(v) for v in self._jaxpr.outvars]

    def _step(self, eqn: JaxprEqn) -> None:
        (made,) = eqn.outvars[:1]
        reduce = _REDUCE.get(eqn.primitive.name)
        if reduce is not None:
            self._values[made] = reduce(self, eqn, self._only_operand(eqn))
            return
        for rule in (self._exp, self._add, self._mul, self._linear, self._map):
            wide = rule(eqn)
            if wide is not None:
                self._wide[made] = wide
                return
        raise _refusal(eqn)

    def _wide_of(self, atom: Var | Literal) -> Wide | None:
        return self._wide.get(atom) if isinstance(atom, Var) else None

    def _is_behind(self, atom: Var | Literal) -> bool:
        return isinstance(atom, Var) and atom in self._behind

    def _only_operand(self, eqn: JaxprEqn) -> Wide:
        """Return the first operand, which must be the only one with the vocabulary."""
        first, *others = map(self._wide_of, eqn.invars)
        if first is None or any(others):
            raise _refusal(eqn)
        return first

    # ---- Equations whose result has the vocabulary, too. None: the equation is not of this kind.

    def _exp(self, eqn: JaxprEqn) -> Wide | None:
        wide = self._wide_of(eqn.invars[0])
        if wide is None or not wide.is_sum or eqn.primitive.name != "exp":
            return None
        return dataclasses.replace(wide, is_exp=True)

    def _add(self, eqn: JaxprEqn) -> Wide | None:
        """Add a value that is equal along the vocabulary to the shift."""
        if eqn.primitive.name not in ("add", "sub"):
            return None
        minus = eqn.primitive.name == "sub"
        first, second = eqn.invars
        wide, other = self._wide_of(first), second
        if wide is None:
            wide, other = self._wide_of(second), first
        if wide is None or not wide.is_sum or not _is_narrow(other, wide.axis):
            return None
        if wide.is_plain and not self._is_behind(other):
            return None  # as good as a part of z
        if minus and other is first:
            wide = wide.negated
        narrow = list(_shape(eqn.outvars[0]))
        narrow[wide.axis] = 1
        shift = jnp.broadcast_to(at_least_float32(self._values.of(other)), narrow)
        shift = -shift if minus and other is second else shift
        return dataclasses.replace(wide, shift=shift if wide.shift is None else wide.shift + shift)

    def _mul(self, eqn: JaxprEqn) -> Wide | None:
        """Weigh a sum by what does not depend on a reduction: a one-hot target."""
        if eqn.primitive.name != "mul":
            return None
        first, second = eqn.invars
        for atom, other in (first, second), (second, first):
            wide = self._wide_of(atom)
            if wide is not None and wide.is_sum and not wide.is_plain:
                weight = self._known(other, wide.axis)
                return weight and dataclasses.replace(wide, weight=weight)
        return None

    def _linear(self, eqn: JaxprEqn) -> Wide | None:
        """Apply what may be applied to both terms of z + shift."""
        name, wide = eqn.primitive.name, self._wide_of(eqn.invars[0])
        if name not in _LINEAR or wide is None or wide.is_plain:
            return None
        if name == "convert_element_type":
            _check_keeps_digits(eqn)
            if wide.is_exp:
                return wide  # summed in at least float32 anyway
        axis = result_axis(eqn, 0, wide.axis)
        if axis is None or not wide.is_sum:
            return None
        return Wide(
            axis=axis,
            take=lambda part: bind(eqn, [wide.take(part)], axis, part.width),
            shift=bind(eqn, [wide.shift], axis, 1),
        )

    def _map(self, eqn: JaxprEqn) -> Wide | None:
        """Compute a part of the result from parts of operands that are known without the loss."""
        wide = {i: w for i, v in enumerate(eqn.invars) if (w := self._wide_of(v))}
        axes = {result_axis(eqn, i, w.axis) for i, w in wide.items()}
        axis = axes.pop()
        known = all(self._wide_of(v) or not self._is_behind(v) for v in eqn.invars)
        if axis is None or axes or not known or not all(w.is_plain for w in wide.values()):
            return None
        (made,) = eqn.outvars
        return Wide(axis=axis, take=lambda part: part.of(made, axis))

    def _known(self, atom: Var | Literal, axis: int) -> Take | None:
        """Return how to compute a part of an operand, if it does not depend on a reduction."""
        wide = self._wide_of(atom)
        if wide is not None:
            return wide.take if wide.is_plain and wide.axis == axis else None
        if self._is_behind(atom):
            return None
        if isinstance(atom, Var) and not _is_narrow(atom, axis):
            return lambda part: part.of(atom, axis)
        return lambda part: part.whole(atom)

    # ---- Reductions along the vocabulary.

    def _reduce(self, reduction: Reduction) -> Any:
        self.reductions.append(reduction)
        if self._reduced is None:
            return reduction(self._whole, None)
        return self._reduced[len(self.reductions) - 1]

    def _softmax(self, wide: Wide) -> Any:
        """Return the maximum of z, and the sum of its exponentials; they are reduced together."""
        if wide.take not in self._softmaxes:
            self._softmaxes[wide.take] = self._reduce(softmax_of(wide.take, wide.axis))
        return self._softmaxes[wide.take]

    def _max(self, eqn: JaxprEqn, wide: Wide) -> Any:
        if not wide.is_plain or tuple(eqn.params["axes"]) != (wide.axis,):
            raise _refusal(eqn)
        if self._is_differentiated(eqn):
            raise _refusal(eqn, "is differentiated; take its jax.lax.stop_gradient")
        maximum, _ = self._softmax(wide)
        return _like(eqn, maximum)

    def _is_differentiated(self, eqn: JaxprEqn) -> bool:
        smooth = [e for e in self._jaxpr.eqns if e.primitive.name != "stop_gradient"]
        behind = jaxprs.dependents(jaxprs.rebuild(self._jaxpr, eqns=smooth), eqn.outvars)
        return any(isinstance(v, Var) and v in behind for v in self._jaxpr.outvars)

    def _sum(self, eqn: JaxprEqn, wide: Wide) -> Any:
        if wide.axis not in eqn.params["axes"]:
            raise _refusal(eqn)
        if not wide.is_exp:
            return _like(eqn, self._weighted_sum(wide))
        self.has_softmax = True
        maximum, total = self._softmax(wide)
        shift = finite(maximum)
        if wide.shift is not None:
            shift = shift + wide.shift.astype(shift.dtype)
        return _like(eqn, total * jnp.exp(shift))

    def _weighted_sum(self, wide: Wide) -> Any:
        take, weight, axis = wide.take, wide.weight, wide.axis
        if weight is None:
            total = self._reduce(sum_of(take, axis))
            return total if wide.shift is None else total + self._size * wide.shift

        def spread(part: Part) -> Any:
            return jnp.broadcast_to(at_least_float32(weight(part)), take(part).shape)

        def weighted(part: Part) -> Any:
            return spread(part) * at_least_float32(take(part))

        total = self._reduce(sum_of(weighted, axis))
        return total + self._reduce(sum_of(spread, axis)) * wide.shift

    def _gather(self, eqn: JaxprEqn, wide: Wide) -> Any:
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        picks = wide.axis in numbers.start_index_map and sizes[wide.axis] == 1
        if not wide.is_sum or not picks or self._is_behind(eqn.invars[1]):
            raise _refusal(eqn)
        picked = self._reduce(pick_of(eqn, wide.take, wide.axis, self._size))
        if wide.shift is None:
            return picked
        indices = self._values.of(eqn.invars[1])
        shift = pick_constant(eqn, wide.shift, indices, wide.axis, self._size)
        return (at_least_float32(picked) + shift).astype(picked.dtype)


_REDUCE: Mapping[str, Callable[[LogitsReader, JaxprEqn, Wide], Any]] = {
    "gather": LogitsReader._gather,
    "reduce_max": LogitsReader._max,
    "reduce_sum": LogitsReader._sum,
}


def _refusal(eqn: JaxprEqn, why: str = "needs the whole vocabulary at once") -> NotAHead:
    return NotAHead(f"{jaxprs.located(eqn)} {why}")


def _check_keeps_digits(eqn: JaxprEqn) -> None:
    """Refuse a conversion of a sum, of which only the terms are known, that rounds it."""
    before, after = (aval.dtype for aval in jaxprs.avals([*eqn.invars, *eqn.outvars]))
    if not (jnp.issubdtype(after, jnp.floating) and _holds(after, before)):
        raise _refusal(
            eqn, f"rounds {before} to {after} before what is read of it has been reduced"
        )


def _holds(larger: Any, smaller: Any) -> bool:
    """Whether every number of one float type is one of the other, too."""
    a, b = jnp.finfo(larger), jnp.finfo(smaller)
    return bool(a.nmant >= b.nmant and a.maxexp >= b.maxexp)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _is_narrow(atom: Var | Literal, axis: int) -> bool:
    return _shape(atom) == () or _shape(atom)[axis] == 1


def _like(eqn: JaxprEqn, value: Any) -> Any:
    """Return `value`, of size 1 along the vocabulary, as the result of the reduction `eqn`."""
    (aval,) = jaxprs.avals(eqn.outvars)
    return eqn.primitive.bind(value.astype(aval.dtype), **eqn.params)
