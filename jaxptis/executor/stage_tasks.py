"""From the programs of stages to what tasks run: each operand becomes a buffer with a name."""

from collections.abc import Mapping, Sequence

from jaxptis.executor.programs import BatchLeaf, needs_index
from jaxptis.executor.tasks import Ref, TaskProgram
from passes.stages import Operand, Role, StageProgram

KINDS = {"F": "forward", "B": "backward", "I": "input_grad", "W": "weight_grad"}
"""What the programs of each kind of task are called."""

MICROBATCH = Ref("microbatch", per_microbatch=True)


def stage_program_name(stage: int, kind: str) -> str:
    """The program of a stage's tasks of a kind, one of F, B, I, W."""
    return f"stage{stage}.{KINDS[kind]}"


def constant(stage: int, index: int) -> str:
    """The buffer of an array that a stage closes over."""
    return f"stage{stage}.constant{index}"


def gradient_sum(param: int, device: int) -> str:
    """The buffer in which a device sums the gradients of a parameter."""
    return f"sum{param}.device{device}"


def result(index: int) -> str:
    """A result of the whole step."""
    return f"result{index}"


def task_programs(
    programs: Mapping[tuple[int, str], StageProgram],
    *,
    homes: Sequence[int],
    batch: Sequence[BatchLeaf],
) -> dict[tuple[int, str], TaskProgram]:
    """Name the buffers of the programs, which are given by stage and kind.

    Args:
      programs: the program of every stage and kind of task; what skips stages was handed on.
      homes: the device of every stage.
      batch: the leaves of the whole batch.
    """
    return {
        (stage, kind): TaskProgram(
            name=stage_program_name(stage, kind),
            reads=(
                *[MICROBATCH] * needs_index(program, batch),
                *(_ref(operand, stage, homes) for operand in program.reads),
            ),
            writes=tuple(_ref(operand, stage, homes) for operand in program.writes),
            sends=tuple(
                _ref(operand, stage, homes)
                for operand in program.writes
                if operand.role in (Role.CROSSING, Role.COTANGENT)
            ),
        )
        for (stage, kind), program in programs.items()
    }


def _ref(operand: Operand, stage: int, homes: Sequence[int]) -> Ref:
    index = operand.index
    match operand.role:
        case Role.CONSTANT:
            return Ref(constant(stage, index), per_microbatch=False)
        case Role.PARAM:
            return Ref(f"param{index}", per_microbatch=False)
        case Role.BATCH:
            return Ref(f"batch{index}", per_microbatch=False)
        case Role.SUM:
            return Ref(gradient_sum(index, homes[stage]), per_microbatch=False)
        case Role.D_LOSS:
            return Ref("d_loss", per_microbatch=False)
        case Role.CROSSING:
            return Ref(f"x{index}", per_microbatch=True)
        case Role.COTANGENT:
            return Ref(f"d{index}.stage{operand.consumer}", per_microbatch=True)
        case Role.RESULT:
            return Ref(result(index), per_microbatch=True)
        case Role.SAVED | Role.KEPT:
            return Ref(f"stage{stage}.{operand.role.name.lower()}{index}", per_microbatch=True)
    raise AssertionError(operand)
