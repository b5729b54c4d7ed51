"""The one file that knows JAX's private parts and how they differ between versions.

Everywhere else a jaxpr is an open `Jaxpr` without constants: its inputs are `invars`, its equations
`eqns`, its results `outvars`. Here such jaxprs are traced, rebuilt, sliced and evaluated.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import distributed
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax._src.interpreters import partial_eval
from jax._src.lax.lax import optimization_barrier_p
from jax.extend import core
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import remat_p

__all__ = [
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Scan",
    "Var",
    "While",
    "applied",
    "apply",
    "avals",
    "backward_slice",
    "check",
    "count_primitives",
    "dependents",
    "drop_dead_equations",
    "equations",
    "evaluate",
    "has_shardings",
    "hides_functions",
    "indexed_sizes",
    "inline",
    "is_float",
    "least_memory",
    "library_work",
    "located",
    "nbytes",
    "process_service",
    "read_vars",
    "reads",
    "rebuild",
    "resized",
    "scan_of",
    "shape_of",
    "splice",
    "sub_jaxprs",
    "trace",
    "variable_like",
    "while_of",
    "with_own_outputs",
]

# Primitives that only call their body, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
# Likewise, once nothing is to be differentiated any more.
_RULES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", remat_p.name: "jaxpr"}


# cuDNN's, and how many matmuls, each of the size of queries with keys, one does.
_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def trace(fun: Callable, *args: Any) -> tuple[Jaxpr, list[Any], Any]:
    """Trace `fun` at abstract arguments.

    Returns:
      The jaxpr, whose leading invars stand for the constants that `fun` closes over; the values of
      those constants; and the pytree of `jax.ShapeDtypeStruct` that `fun` returns.
    """
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    invars = [*jaxpr.constvars, *jaxpr.invars]
    return rebuild(jaxpr, invars=invars), list(closed.consts), out


def rebuild(
    jaxpr: Jaxpr,
    *,
    invars: Sequence[Var] | None = None,
    outvars: Sequence[Var | Literal] | None = None,
    eqns: Sequence[JaxprEqn] | None = None,
) -> Jaxpr:
    """Return `jaxpr`, without constants, with the given parts replaced."""
    return Jaxpr(
        (),
        list(jaxpr.invars if invars is None else invars),
        list(jaxpr.outvars if outvars is None else outvars),
        list(jaxpr.eqns if eqns is None else eqns),
        jaxpr.effects,
        jaxpr.debug_info.with_unknown_names(),
    )


def evaluate(jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Run `jaxpr` on `args`, or trace it if they are tracers."""
    return jax.core.eval_jaxpr(jaxpr, (), *args)


def apply(jaxpr: Jaxpr, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Run an equation of `jaxpr` on values; their shapes may be others than those of its inputs."""
    inputs = [core.gensym()(v.aval) for v in eqn.invars]
    alone = [eqn.replace(invars=[*inputs])]
    return evaluate(rebuild(jaxpr, invars=inputs, outvars=eqn.outvars, eqns=alone), values)


def check(jaxpr: Jaxpr) -> None:
    """Raise if `jaxpr` reads an unbound variable or breaks a type."""
    core.check_jaxpr(jaxpr)


def reads(eqn: JaxprEqn) -> Iterator[Var]:
    """Yield the variables that `eqn` reads."""
    return (v for v in eqn.invars if isinstance(v, Var))


def read_vars(jaxpr: Jaxpr) -> set[Var]:
    """Return the variables that an equation or the result of `jaxpr` reads."""
    results = {v for v in jaxpr.outvars if isinstance(v, Var)}
    return results.union(*(reads(eqn) for eqn in jaxpr.eqns))


def avals(variables: Iterable[Var | Literal]) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of `variables`, in the form in which functions are traced."""
    types: Iterator[Any] = (v.aval for v in variables)
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in types]


def dependents(jaxpr: Jaxpr, seeds: Iterable[Var]) -> set[Var]:
    """Return the variables that depend on `seeds`, themselves included."""
    found = set(seeds)
    for eqn in jaxpr.eqns:
        if not found.isdisjoint(reads(eqn)):
            found.update(eqn.outvars)
    return found


def backward_slice(
    jaxpr: Jaxpr, *, invars: Sequence[Var], outvars: Sequence[Var | Literal]
) -> Jaxpr:
    """Return the part of `jaxpr` that computes `outvars` from `invars`, in the same order.

    `invars` may be any variables of `jaxpr`; those that are not read stay as unused inputs.

    Raises:
      ValueError: `outvars` need an input of `jaxpr` that is not among `invars`.
    """
    given = set(invars)
    needed = {v for v in outvars if isinstance(v, Var)} - given
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.difference_update(eqn.outvars)
            needed.update(v for v in reads(eqn) if v not in given)
    if needed:
        raise ValueError(f"the slice reads {len(needed)} values that are not among its inputs")
    return rebuild(jaxpr, invars=invars, outvars=outvars, eqns=kept[::-1])


def with_own_outputs(jaxpr: Jaxpr, *, also_inputs: bool) -> Jaxpr:
    """Return `jaxpr` with no value twice among its results, but copies.

    With `also_inputs`, inputs among the results are copied, too.
    """
    taken = set(jaxpr.invars) if also_inputs else set()
    shared = []
    for v in jaxpr.outvars:
        shared.append(v in taken if isinstance(v, Var) else False)
        taken.update([v] if isinstance(v, Var) else [])

    def fun(*args: Any) -> list[Any]:
        outs = evaluate(jaxpr, args)
        return [jax.numpy.copy(x) if again else x for x, again in zip(outs, shared, strict=True)]

    return inline(trace(fun, *avals(jaxpr.invars))[0])[0] if any(shared) else jaxpr


def drop_dead_equations(jaxpr: Jaxpr) -> Jaxpr:
    """Remove, also inside loops and branches, what no output reads; inputs all stay."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return rebuild(live)


def _call_body(eqn: JaxprEqn, *, also_rules: bool) -> tuple[Jaxpr, list[Any]] | None:
    """Return the body and the constants of an equation that only calls it, else None."""
    name = eqn.primitive.name
    key = _CALLS.get(name) or (_RULES.get(name) if also_rules else None)
    if key is None:
        return None
    body = eqn.params[key]
    inner = getattr(body, "jaxpr", body)
    return inner, list(getattr(body, "consts", ()))


def inline(jaxpr: Jaxpr, *, also_rules: bool = False) -> tuple[Jaxpr, list[Any]]:
    """Replace calls by their bodies, at every depth outside of loops, branches and custom rules.

    With `also_rules`, functions with custom derivative rules count as calls: the rules are lost.
    So does the recomputation of a `jax.checkpoint`; as in JAX, a barrier stands before it, which
    keeps it from being merged with what was computed before.

    Returns:
      The jaxpr, with one more invar in front for each constant that a body closed over, and the
      values of these constants.
    """
    fresh = core.gensym()
    env: dict[Var, Var | Literal] = {}
    const_vars: dict[int, Var] = {}  # by the id of the value, which may be closed over many times
    const_values: list[Any] = []
    eqns: list[JaxprEqn] = []

    def read(atom: Var | Literal) -> Var | Literal:
        return env.get(atom, atom) if isinstance(atom, Var) else atom

    def walk(body: Jaxpr, name_stack: Any, rename: bool) -> None:
        for eqn in body.eqns:
            info = eqn.source_info
            if name_stack is not None:
                info = info.replace(name_stack=name_stack + info.name_stack)
            call = _call_body(eqn, also_rules=also_rules)
            if call is None:
                outvars = [fresh(v.aval) for v in eqn.outvars] if rename else eqn.outvars
                env.update(zip(eqn.outvars, outvars, strict=True))
                invars = [read(v) for v in eqn.invars]
                eqns.append(eqn.replace(invars=invars, outvars=outvars, source_info=info))
                continue
            inner, consts = call
            args = [read(v) for v in eqn.invars]
            if eqn.params.get("differentiated") and eqn.params["prevent_cse"]:
                behind = {v: fresh(v.aval) for v in args if isinstance(v, Var)}
                eqns.append(
                    eqn.replace(
                        primitive=optimization_barrier_p,
                        params={},
                        invars=list(behind),
                        outvars=list(behind.values()),
                        source_info=info,
                    )
                )
                args = [behind.get(v, v) if isinstance(v, Var) else v for v in args]
            for var, value in zip(inner.constvars, consts, strict=True):
                if id(value) not in const_vars:
                    const_vars[id(value)] = fresh(var.aval)
                    const_values.append(value)
                env[var] = const_vars[id(value)]
            # The same body may be called many times: its variables are bound anew each time.
            env.update(zip(inner.invars, args, strict=True))
            walk(inner, info.name_stack, True)
            env.update(zip(eqn.outvars, [read(v) for v in inner.outvars], strict=True))

    walk(jaxpr, None, False)
    outvars = [read(v) for v in jaxpr.outvars]
    return rebuild(
        jaxpr, invars=[*const_vars.values(), *jaxpr.invars], outvars=outvars, eqns=eqns
    ), (const_values)


def splice(jaxpr: Jaxpr, bodies: Mapping[int, Jaxpr]) -> Jaxpr:
    """Replace equations, by index, by the equations of bodies that do the same.

    The last inputs of a body are those of its equation. Any before them are constants, and become
    inputs in front of those of `jaxpr`.
    """
    env: dict[Var, Var | Literal] = {}
    eqns: list[JaxprEqn] = []
    extra: list[Var] = []

    def read(atom: Var | Literal) -> Var | Literal:
        return env.get(atom, atom) if isinstance(atom, Var) else atom

    for index, eqn in enumerate(jaxpr.eqns):
        args = [read(v) for v in eqn.invars]
        body = bodies.get(index)
        if body is None:
            eqns.append(eqn.replace(invars=args))
            continue
        first = len(body.invars) - len(args)
        extra += body.invars[:first]
        env.update(zip(body.invars[first:], args, strict=True))
        for inner in body.eqns:
            stack = eqn.source_info.name_stack + inner.source_info.name_stack
            info = inner.source_info.replace(name_stack=stack)
            eqns.append(inner.replace(invars=[read(v) for v in inner.invars], source_info=info))
        env.update(zip(eqn.outvars, [read(v) for v in body.outvars], strict=True))
    outvars = [read(v) for v in jaxpr.outvars]
    return rebuild(jaxpr, invars=[*extra, *jaxpr.invars], outvars=outvars, eqns=eqns)


def shape_of(atom: Var | Literal) -> tuple[int, ...]:
    """Return the shape of the array that `atom` stands for."""
    aval: Any = atom.aval
    return tuple(aval.shape)


def variable_like(var: Var, shape: Sequence[int]) -> Var:
    """Return a new variable of the type of `var`, but for its shape."""
    aval: Any = var.aval
    return core.gensym()(aval.update(shape=tuple(shape)))


def resized(
    eqn: JaxprEqn,
    *,
    invars: Sequence[Var | Literal],
    shape: Sequence[int],
    params: Mapping[str, Any],
) -> JaxprEqn:
    """Return `eqn` on other inputs, with new results of another shape; `params` change."""
    outvars = [variable_like(v, shape) for v in eqn.outvars]
    return eqn.replace(invars=list(invars), outvars=outvars, params={**eqn.params, **params})


def applied(
    fun: Callable[[list[Any]], Any], atoms: Sequence[Var | Literal]
) -> tuple[list[JaxprEqn], Var | Literal]:
    """Return the equations of `fun`, which takes a list, on `atoms`, and what holds its result."""
    jaxpr, constants, _ = trace(fun, avals(atoms))
    assert not constants, "an open jaxpr has no constants"
    env = dict(zip(jaxpr.invars, atoms, strict=True))
    eqns = [
        eqn.replace(invars=[env.get(v, v) if isinstance(v, Var) else v for v in eqn.invars])
        for eqn in jaxpr.eqns
    ]
    return eqns, jaxpr.outvars[0]


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


def sub_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Yield the jaxprs inside of `eqn`: bodies of loops, branches, calls.

    That of a kernel is none: it reads and writes memory, and is for one block.
    """
    is_kernel = eqn.primitive.name == "pallas_call"
    return iter(()) if is_kernel else iter(core.jaxprs_in_params(eqn.params))


def has_shardings(eqn: JaxprEqn) -> bool:
    """Whether `eqn` is a jit that was given shardings of its arguments or results."""
    keys = ("in_shardings", "out_shardings")
    given = [each for key in keys for each in eqn.params.get(key, ())]
    return eqn.primitive.name in _CALLS and any(isinstance(s, jax.sharding.Sharding) for s in given)


def hides_functions(eqn: JaxprEqn) -> bool:
    """Whether the text of `eqn` leaves out what it does: a derivative rule, what a remat saves."""
    return eqn.primitive.name in _RULES


def indexed_sizes(eqn: JaxprEqn) -> list[int]:
    """Return how long the axes are that a gather has indices for; none of other equations."""
    if eqn.primitive.name != "gather":
        return []
    shape = shape_of(eqn.invars[0])
    return [shape[axis] for axis in eqn.params["dimension_numbers"].start_index_map]


def count_primitives(jaxpr: Jaxpr) -> dict[str, int]:
    """Count the equations of each primitive, those inside of loops and branches included."""
    return collections.Counter(eqn.primitive.name for eqn in equations(jaxpr))


def located(eqn: JaxprEqn) -> str:
    """Return `primitive at file:line (function)`, the user's; `primitive` if no line is known."""
    from jax._src import source_info_util

    line = source_info_util.summarize(eqn.source_info)
    return f"{eqn.primitive.name} at {line}" if line else eqn.primitive.name


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations of `jaxpr`, those inside of loops, branches and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from equations(inner)


def is_float(aval: Any) -> bool:
    """Whether values of this type have a gradient."""
    return jax.dtypes.issubdtype(aval.dtype, jax.numpy.inexact)


def nbytes(avals: Iterable[Any]) -> int:
    """Return the bytes that values of these types take."""
    return sum(aval.size * aval.dtype.itemsize for aval in avals)


def library_work(eqn: JaxprEqn) -> tuple[int, int]:
    """Return the operations, and the bytes read and written, of what a GPU has libraries for.

    Also of kernels, if they say. All else is 0 and 0. Of attention with a causal mask half is done.
    """
    name = eqn.primitive.name
    operands: list[Any] = [x.aval for x in (*eqn.invars, *eqn.outvars)]
    if name == "dot_general":
        ((contracted, _), _), lhs = eqn.params["dimension_numbers"], operands[0]
        return 2 * operands[-1].size * math.prod(lhs.shape[d] for d in contracted), nbytes(operands)
    if name == "conv_general_dilated":
        kernel, spec = operands[1], eqn.params["dimension_numbers"].rhs_spec
        flops = 2 * operands[-1].size * kernel.size // kernel.shape[spec[0]]
        return flops, nbytes(operands)
    if name in _ATTENTION:
        (B, T, N, H), S = operands[0].shape, operands[1].shape[1]
        window = eqn.params["sliding_window_length"]
        pairs = B * N * (T * min(S, window) if window else T * S)
        halved = not window and eqn.params["mask_type"] == MaskType.CAUSAL
        return _ATTENTION[name] * 2 * H * pairs // (2 if halved else 1), nbytes(operands)
    if name == "pallas_call" and eqn.params["cost_estimate"] is not None:
        return eqn.params["cost_estimate"].flops, nbytes(operands)
    return 0, 0


def least_memory(platform: str) -> dict[str, Any]:
    """Return the compiler options with which a program has as few temporaries as XLA can do.

    For a CPU it orders operations for most of them to run at once, unless told otherwise: a stage
    then holds the gradients of all its parameters beside their sums.
    """
    if platform != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def process_service() -> Any:
    """Return the client of the key-value service that `jax.distributed` runs, or None.

    It is here for being private: JAX has no public way to the service.
    """
    return distributed.global_state.client
