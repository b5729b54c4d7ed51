"""What there is to say of the compiled program of a stage and kind of task."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.hlo_ops import Op, read_ops
from jaxptis.cluster import DeviceSpec
from jaxptis.executor.compiled import CompiledProgram
from jaxptis.executor.stage_tasks import KINDS
from jaxptis.performance.costs import roofline_s

NUM_COSTLIEST = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostlyOp:
    """An op, the seconds that it takes at least, and their share of those of all ops."""

    op: Op
    roofline_s: float
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspected:
    """The compiled program of a stage and kind of task.

    Attributes:
        stage: its index.
        kind: of task; F, B, I or W.
        layers: of the stage.
        same_as: the name of an earlier one that is equal but for its layers, or None.
        flops: as XLA counts them, each loop as if it ran once.
        product_flops: of matrix products and convolutions, loops as often as they run.
        bytes_accessed: as XLA counts them.
        temporary_bytes: of memory that it needs beside its inputs and results.
        argument_bytes: of its inputs.
        output_bytes: of its results.
        overwritten_bytes: of results that take the memory of inputs.
        collectives: how often each kind runs.
        num_open_loops: loops of which nobody knows how often they run, counted as once.
        costliest: ops, the most seconds first.
        stablehlo: what JAX made.
        hlo: what XLA made of it.
    """

    stage: int
    kind: str
    layers: tuple[str, ...]
    same_as: str | None = None
    flops: float
    product_flops: float
    bytes_accessed: float
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    overwritten_bytes: int
    collectives: Mapping[str, int]
    num_open_loops: int
    costliest: tuple[CostlyOp, ...]
    stablehlo: str
    hlo: str

    @property
    def name(self) -> str:
        """What it is called, for people and as a file."""
        return f"stage{self.stage:02d}.{KINDS[self.kind]}"


def inspect(
    program: CompiledProgram,
    *,
    stage: int,
    kind: str,
    layers: tuple[str, ...],
    device: DeviceSpec,
) -> Inspected:
    """Compiles a program, and returns what there is to say; ops are ordered for a device."""
    hlo = program.as_text("hlo")
    ops = read_ops(hlo)
    counts, memory = program.cost_analysis() or {}, program.memory_analysis()
    return Inspected(
        stage=stage,
        kind=kind,
        layers=layers,
        flops=counts.get("flops", 0.0),
        product_flops=sum(op.flops for op in ops.ops),
        bytes_accessed=counts.get("bytes accessed", 0.0),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        overwritten_bytes=memory.alias_size_in_bytes,
        collectives=ops.collectives,
        num_open_loops=ops.num_open_loops,
        costliest=_costliest(ops.ops, device),
        stablehlo=program.as_text("stablehlo"),
        hlo=hlo,
    )


def _costliest(ops: tuple[Op, ...], device: DeviceSpec) -> tuple[CostlyOp, ...]:
    seconds = {op: roofline_s(op.flops, op.bytes_accessed, device) for op in ops}
    total_s = sum(seconds.values()) or 1.0
    first = sorted(ops, key=lambda op: -seconds[op])[:NUM_COSTLIEST]
    return tuple(
        CostlyOp(op=op, roofline_s=seconds[op], share=seconds[op] / total_s) for op in first
    )


def name_collectives(inspected: Inspected) -> str:
    """Returns the collectives of a program and how often they run, or that there are none."""
    found = inspected.collectives.items()
    return ", ".join(f"{kind} x {times}" for kind, times in found) or "none"


def count(flops: float) -> str:
    """Writes a number with three digits and the prefix that suits it."""
    for prefix, each in ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3):
        if flops >= each * 0.9995:  # what rounds to 1000 of a prefix is 1 of the next
            return f"{flops / each:.3g} {prefix}"
    return f"{flops:.3g}"


def to_json(inspected: Inspected) -> dict[str, Any]:
    """Returns all figures, without the texts."""
    figures = {
        field.name: getattr(inspected, field.name)
        for field in dataclasses.fields(inspected)
        if field.name not in ("stablehlo", "hlo", "costliest")
    }
    costliest = [
        {**dataclasses.asdict(each.op), "roofline_s": each.roofline_s, "share": each.share}
        for each in inspected.costliest
    ]
    return {**figures, "costliest": costliest}
