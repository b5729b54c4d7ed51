"""The parts of loops, which JAX's versions name differently."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """The parts of a scan.

    Attributes:
      jaxpr: (constants, carry, a slice of each x) -> (carry, a slice of each y).
      body: the same as a function.
      num_consts: inputs of the scan that every iteration reads whole.
      num_carry: inputs after those, and results in front, that go from iteration to iteration.
      length: number of iterations.
      unroll: how many of them are one iteration of the compiled loop.
      reverse: whether the last iteration is the first to run.
    """

    jaxpr: Jaxpr
    body: Callable[..., list[Any]]
    num_consts: int
    num_carry: int
    length: int
    unroll: int
    reverse: bool


def scan_of(eqn: JaxprEqn) -> Scan | None:
    """Return the parts of `eqn` if it is a scan, else None."""
    if eqn.primitive.name != "scan":
        return None
    params = eqn.params
    closed = params["jaxpr"]
    if "ft_in" in params:  # since jax 0.12
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    inner = getattr(closed, "jaxpr", closed)
    consts = getattr(closed, "consts", ())
    return Scan(
        jaxpr=inner,
        body=lambda *args: jax.core.eval_jaxpr(inner, consts, *args),
        num_consts=num_consts,
        num_carry=num_carry,
        length=params["length"],
        unroll=params["unroll"],
        reverse=params["reverse"],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class While:
    """The parts of a while loop.

    Attributes:
      cond: (its constants, carry) -> (whether to go on,).
      body: (its constants, carry) -> carry.
      num_cond_consts: inputs of the loop that the condition alone reads.
      num_consts: inputs after those, that every iteration reads whole; the rest is carried.
    """

    cond: Jaxpr
    body: Jaxpr
    num_cond_consts: int
    num_consts: int


def while_of(eqn: JaxprEqn) -> While | None:
    """Return the parts of `eqn` if it is a while loop, else None."""
    if eqn.primitive.name != "while":
        return None
    cond, body = (eqn.params[name] for name in ("cond_jaxpr", "body_jaxpr"))
    return While(
        cond=getattr(cond, "jaxpr", cond),
        body=getattr(body, "jaxpr", body),
        num_cond_consts=eqn.params["cond_nconsts"],
        num_consts=eqn.params["body_nconsts"],
    )
