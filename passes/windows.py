"""The body of a loop, of what an iteration reads and writes of the arrays that it goes through.

XLA slices an array that a loop carries, and updates it, in place: an iteration touches one window
of it, however large it is. A program of the body alone would copy the whole.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from passes import jaxprs
from passes.jaxprs import Jaxpr, JaxprEqn, Literal, Scan, Var, While, shape_of
from passes.origins import called_body

Shape = tuple[int, ...]


class _Use(NamedTuple):
    """How an array is used that is only sliced and updated.

    Attributes:
      window: as large as all that is read or written at a time.
      results: the numbers of the results that are the array again.
    """

    window: Shape
    results: frozenset[int] = frozenset()


def body_on_windows(scan: Scan) -> Jaxpr:
    """Return the body of `scan` with every array that it only slices and updates cut to a window.

    Its inputs are those of the scan's body, any constants of it first.
    """
    body = jaxprs.rebuild(scan.jaxpr, invars=[*scan.jaxpr.constvars, *scan.jaxpr.invars])
    first = len(scan.jaxpr.constvars) + scan.num_consts
    types = jaxprs.avals(body.invars)
    for index, aval in enumerate(types):
        is_carried = first <= index < first + scan.num_carry
        use = _of_body(body, index, index - first if is_carried else None)
        if use is not None:
            types[index] = jax.ShapeDtypeStruct(use.window, aval.dtype)
    if all(aval.shape == shape_of(v) for aval, v in zip(types, body.invars, strict=True)):
        return body
    return jaxprs.trace(lambda *args: _run(body, args), *types)[0]


def _of_body(body: Jaxpr, index: int, result: int | None) -> _Use | None:
    """Return how the body of a loop uses an input, which may come back as `result` only."""
    use = _of_input(body, index)
    back = frozenset() if result is None else frozenset([result])
    return use if use is not None and use.results == back else None


def _of_input(jaxpr: Jaxpr, index: int) -> _Use | None:
    """Return how `jaxpr` uses an input; None if as a whole."""
    same = {jaxpr.invars[index]}
    window: Shape = (0,) * len(shape_of(jaxpr.invars[index]))
    for eqn in jaxpr.eqns:
        for place, atom in enumerate(eqn.invars):
            if isinstance(atom, Var) and atom in same:
                use = _of_operand(eqn, place)
                if use is None:
                    return None
                window = tuple(map(max, window, use.window))
                same.update(eqn.outvars[result] for result in use.results)
    results = (k for k, v in enumerate(jaxpr.outvars) if isinstance(v, Var) and v in same)
    return _Use(window, frozenset(results))


def _of_operand(eqn: JaxprEqn, place: int) -> _Use | None:
    """Return how `eqn` uses an operand; None if as a whole."""
    rule, body = _RULES.get(eqn.primitive.name), called_body(eqn)
    if rule is not None:
        return rule(eqn, place)
    return None if body is None else _of_input(body, place)


def _dynamic_slice(eqn: JaxprEqn, place: int) -> _Use | None:
    return _Use(shape_of(eqn.outvars[0])) if place == 0 else None


def _dynamic_update_slice(eqn: JaxprEqn, place: int) -> _Use | None:
    return _Use(shape_of(eqn.invars[1]), frozenset([0])) if place == 0 else None


def _while(eqn: JaxprEqn, place: int) -> _Use | None:
    loop = jaxprs.while_of(eqn)
    assert loop is not None
    index = place - loop.num_cond_consts  # in the body
    if index < loop.num_consts:
        return _of_body(loop.body, index, None) if index >= 0 else None
    result = index - loop.num_consts
    is_tested = loop.cond.invars[loop.num_cond_consts + result] in jaxprs.read_vars(loop.cond)
    return None if is_tested else _of_body(loop.body, index, result)


def _scan(eqn: JaxprEqn, place: int) -> _Use | None:
    scan = jaxprs.scan_of(eqn)
    assert scan is not None
    result = place - scan.num_consts
    if result >= scan.num_carry:
        return None
    return _of_body(scan.jaxpr, place, result if result >= 0 else None)


def _cond(eqn: JaxprEqn, place: int) -> _Use | None:
    if place == 0:
        return None
    found = [_of_input(branch, place - 1) for branch in jaxprs.sub_jaxprs(eqn)]
    uses = [use for use in found if use is not None]
    if len(uses) < len(found) or len({use.results for use in uses}) > 1:
        return None
    windows = (use.window for use in uses)
    return _Use(tuple(map(max, *windows)), uses[0].results)


_RULES: dict[str, Callable[[JaxprEqn, int], _Use | None]] = {
    "cond": _cond,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "scan": _scan,
    "while": _while,
}


def _run(jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Run `jaxpr` on arguments of which some are windows of its inputs."""
    env: dict[Var, Any] = dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Var | Literal) -> Any:
        return env[atom] if isinstance(atom, Var) else atom.val

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        env.update(zip(eqn.outvars, _run_equation(jaxpr, eqn, values), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _run_equation(jaxpr: Jaxpr, eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    """Loops, branches and calls are made anew if windows go into them; all else takes any shape."""
    body, is_whole = called_body(eqn), [shape_of(v) for v in eqn.invars] == [*map(np.shape, values)]
    if is_whole or eqn.primitive.name in ("dynamic_slice", "dynamic_update_slice"):
        return jaxprs.apply(jaxpr, eqn, values)
    if body is not None:
        return _run(body, values)
    if (loop := jaxprs.while_of(eqn)) is not None:
        return _run_while(loop, values)
    if (scan := jaxprs.scan_of(eqn)) is not None:
        return _run_scan(scan, values)
    index, *operands = values
    branches = [_function(branch) for branch in jaxprs.sub_jaxprs(eqn)]
    return jax.lax.switch(index, branches, *operands)


def _function(branch: Jaxpr) -> Callable[..., list[Any]]:
    return lambda *args: _run(branch, args)


def _run_while(loop: While, values: Sequence[Any]) -> Sequence[Any]:
    of_cond, rest = values[: loop.num_cond_consts], values[loop.num_cond_consts :]
    consts, carry = rest[: loop.num_consts], rest[loop.num_consts :]
    return jax.lax.while_loop(
        lambda carry: _run(loop.cond, [*of_cond, *carry])[0],
        lambda carry: _run(loop.body, [*consts, *carry]),
        list(carry),
    )


def _run_scan(scan: Scan, values: Sequence[Any]) -> Sequence[Any]:
    first = scan.num_consts + scan.num_carry
    consts, carry, xs = values[: scan.num_consts], values[scan.num_consts : first], values[first:]

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _run(scan.jaxpr, [*consts, *carry, *x])
        return results[: scan.num_carry], results[scan.num_carry :]

    last, ys = jax.lax.scan(
        step, list(carry), list(xs), length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    return [*last, *ys]
