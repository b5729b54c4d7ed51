"""What the ops of a program cost, estimated from the text of its optimized HLO.

An op is what XLA runs by itself: a fusion is one. Its bytes are those of its operands and of its
result, as if nothing stayed in a cache; of what it slices, gathers or updates in place only the
slices. Its flops are two for each product in a matrix product or a convolution, and none for all
else, which takes the time of its bytes. The body of a loop counts as often as it runs where XLA
knows how often that is, or else once; each branch of a conditional counts once.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# They name, group or wait for what others have made.
_FREE = {
    *("after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter"),
    *("partition-id", "replica-id", "tuple"),
}
_SLICES = {"dynamic-slice", "gather", "slice"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What is written of their first operand: the operand with this number."""

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(?:body|branch_computations|calls|true_computation|false_computation|to_apply)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
# Calls of libraries have the dimensions in their settings.
_CONTRACTED = re.compile(r'(?:lhs_contracting_dims=\{|"lhs_contracting_dimensions":\[)([\d,"]*)')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of a program.

    Attributes:
        name: in the HLO.
        opcode: such as "fusion" or "dot".
        origin: what JAX says of it: functions, layers and primitive; empty if nothing.
        times: how often it runs.
        flops: all those times.
        bytes_accessed: all those times.
    """

    name: str
    opcode: str
    origin: str
    times: int
    flops: float
    bytes_accessed: float


@dataclasses.dataclass(frozen=True)
class Ops:
    """All ops of a program.

    Attributes:
        ops: in the order of the text.
        num_open_loops: loops of which nobody knows how often they run, counted as once.
    """

    ops: tuple[Op, ...]
    num_open_loops: int

    @property
    def collectives(self) -> dict[str, int]:
        """How often each kind of collective runs."""
        found: Counter[str] = Counter()
        for op in self.ops:
            kind = op.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found[kind] += op.times
        return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def num_bytes(self) -> float:
        return sum(_nbytes(*each) for each in _shapes(self.shape))

    @property
    def called(self) -> list[str]:
        return [name for found in _CALLED.findall(self.rest) for name in _names(found)]


_Computation = dict[str, _Instruction]


def read_ops(hlo: str) -> Ops:
    """Returns the ops of a program, given as `compiled.as_text()` returns it."""
    computations, entry = _parse(hlo)
    times: Counter[str] = Counter()
    open_loops = _count_runs(computations, entry, 1, times)
    return Ops(
        tuple(
            _op(each, computations[name], computations, count)
            for name, count in times.items()
            for each in computations[name].values()
            if _is_op(each)
        ),
        open_loops,
    )


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Returns the computations by name, and the name of the one that runs first."""
    computations: dict[str, _Computation] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = {}
        elif found := _INSTRUCTION.match(line):
            inside, rest = _split_at_end(found[4])
            computations[name][found[1]] = _Instruction(
                name=found[1],
                shape=found[2],
                opcode=found[3],
                operands=tuple(_names(inside)),
                rest=rest,
            )
    return computations, entry


def _split_at_end(text: str) -> tuple[str, str]:
    """Splits behind the operands, at the parenthesis that closes them."""
    depth = 1
    for index, each in enumerate(text):
        depth += (each == "(") - (each == ")")
        if not depth:
            return text[:index], text[index + 1 :]
    return text, ""


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", text)


def _count_runs(
    computations: Mapping[str, _Computation], name: str, times: int, found: Counter[str]
) -> int:
    """Adds how often a computation, and those that it calls, run; returns the number of open loops.

    What is inside of an op, such as a fusion or the sum of a reduction, is not run by itself.
    """
    found[name] += times
    open_loops = 0
    for each in computations[name].values():
        inside = times
        if each.opcode == "while":
            count = _TRIP_COUNT.search(each.rest)
            open_loops += count is None
            inside = times * int(count[1]) if count else times
        if each.opcode in ("while", "call", "conditional", "async-start"):
            for called in each.called:
                open_loops += _count_runs(computations, called, inside, found)
    return open_loops


def _is_op(each: _Instruction) -> bool:
    return not (
        each.opcode in _FREE
        or each.opcode in ("while", "call", "conditional")
        or each.opcode.startswith("async-")
        or each.opcode.endswith(("-done", "-update"))
    )


def _op(
    each: _Instruction,
    around: _Computation,
    computations: Mapping[str, _Computation],
    times: int,
) -> Op:
    origin = re.search(r'op_name="([^"]*)"', each.rest)
    return Op(
        name=each.name,
        opcode=each.opcode,
        origin=origin[1] if origin else "",
        times=times,
        flops=_flops(each, around, computations) * times,
        bytes_accessed=_bytes(each, around, computations) * times,
    )


def _flops(
    each: _Instruction, around: _Computation, computations: Mapping[str, _Computation]
) -> float:
    if each.opcode == "fusion":
        inside = [computations[name] for name in each.called]
        return sum(_flops(one, c, computations) for c in inside for one in c.values())
    if not each.operands or not _shapes(each.shape):
        return 0.0
    num_results = math.prod(_shapes(each.shape)[0][1])
    operands = [_shapes(around[name].shape) for name in each.operands if name in around]
    if each.opcode == "convolution":
        labels = re.search(r"dim_labels=\w+_(\w+)->", each.rest)
        assert labels is not None, each
        kernel = operands[1][0][1]
        return 2.0 * num_results * math.prod(kernel) / kernel[labels[1].index("o")]
    dims = _CONTRACTED.search(each.rest)
    if dims is None:
        return 0.0
    left = operands[0][0][1]
    return 2.0 * num_results * math.prod(left[int(d)] for d in re.findall(r"\d+", dims[1]))


def _bytes(
    each: _Instruction, around: _Computation, computations: Mapping[str, _Computation]
) -> float:
    if each.opcode == "fusion" and each.called:
        return _bytes_of_fusion(each, computations[each.called[0]])
    operands = [around[name].num_bytes for name in each.operands if name in around]
    if each.opcode in _SLICES:
        return 2 * each.num_bytes
    if each.opcode in _UPDATES and len(operands) > _UPDATES[each.opcode]:
        return 2 * operands[_UPDATES[each.opcode]]
    return each.num_bytes + sum(operands)


def _bytes_of_fusion(fusion: _Instruction, inside: _Computation) -> float:
    """Returns what is read of its parameters and written of its result."""
    total = 0.0
    for each in inside.values():
        if each.opcode == "parameter":
            readers = [other for other in inside.values() if each.name in other.operands]
            parts = [_part_of(each.name, other, inside) for other in readers]
            total += min(each.num_bytes, sum(each.num_bytes if p is None else p for p in parts))
    root = list(inside.values())[-1]
    written = root.operands[_UPDATES[root.opcode]] if root.opcode in _UPDATES else None
    return total + (inside[written].num_bytes if written else fusion.num_bytes)


def _part_of(name: str, reader: _Instruction, inside: _Computation) -> float | None:
    """Returns how many bytes of a value are touched if only some are, or None."""
    if reader.operands[0] != name or name in reader.operands[1:]:
        return None
    if reader.opcode in _SLICES:
        return reader.num_bytes
    if reader.opcode in _UPDATES:
        return inside[reader.operands[_UPDATES[reader.opcode]]].num_bytes
    return None


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the type and the sizes of each array in the text of a shape."""
    return [
        (dtype, tuple(int(n) for n in re.findall(r"\d+", sizes)))
        for dtype, sizes in _SHAPE.findall(text)
    ]


def _nbytes(dtype: str, sizes: Sequence[int]) -> float:
    bits = re.search(r"\d+", dtype)
    width = {"pred": 8, "token": 0, "opaque": 0}.get(dtype, int(bits[0]) if bits else 0)
    return math.prod(sizes) * width / 8
