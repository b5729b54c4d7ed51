"""From a plan, or an update split by device, to the instruction lists of the devices."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxptis.executor.instructions import Rows
from jaxptis.performance import Timeline
from jaxptis.plan import Plan, Task
from jaxptis.plan.order import execution_order
from passes.device_split import DeviceSplit
from passes.stages import Cotangent, Stage, StageGradient, Stages


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the tasks of a plan run.

    Attributes:
      stages: what crosses between the stages.
      gradients: their programs with a backward; None to run forward only.
      indexed: for each stage, whether its programs take the index of the microbatch.
    """

    stages: Stages
    gradients: tuple[StageGradient, ...] | None
    indexed: tuple[bool, ...]


def emit_tasks(rows: Rows, plan: Plan, timeline: Timeline, parts: Parts) -> None:
    """Write the tasks of the plan and the transfers between them.

    A transfer stands, in both lists, where the predicted timeline has its value ready.
    """
    order = {task: i for i, task in enumerate(execution_order(plan.schedule))}
    spans = [(device, span) for device, row in enumerate(timeline.spans) for span in row]
    spans.sort(key=lambda each: (each[1].start_s, order[each[1].task]))
    waiting: list[tuple[float, int, int, int, str]] = []

    def send_until(now_s: float) -> None:
        while waiting and waiting[0][0] <= now_s:
            rows.transfer(*heapq.heappop(waiting)[2:])

    for device, span in spans:
        send_until(span.start_s)
        task = span.task
        emit = _forward if task.kind == "F" else _backward
        made = emit(rows, device, task, parts)
        targets = {(plan.stages[stage].device, buffer) for stage, buffer in made}
        for target, buffer in sorted(targets):
            if target != device:
                heapq.heappush(waiting, (span.end_s, order[task], device, target, buffer))
    send_until(float("inf"))


def activation(crossing: int, microbatch: int) -> str:
    """The buffer of a crossing."""
    return f"x{crossing}.{microbatch}"


def cotangent(d: Cotangent, microbatch: int) -> str:
    """The buffer of a crossing's gradient, as one consumer sees it."""
    return f"d{d.crossing}.stage{d.consumer}.{microbatch}"


def constant(stage: int, index: int) -> str:
    """The buffer of an array that a stage closes over."""
    return f"stage{stage}.constant{index}"


def gradient_sum(param: int, device: int) -> str:
    """The buffer in which a device sums the gradients of a parameter."""
    return f"sum{param}.device{device}"


def result(index: int, microbatch: int | None = None) -> str:
    """The result of one microbatch, or without it of the whole step."""
    return f"result{index}" if microbatch is None else f"result{index}.{microbatch}"


def stage_program_name(stage: int, kind: str) -> str:
    """The program of a stage's tasks of a kind, F or B."""
    return f"stage{stage}.{'forward' if kind == 'F' else 'backward'}"


def _held(task: Task, stage: Stage, num_constants: int, indexed: bool) -> Iterator[str]:
    """Yield the inputs that forward and backward have in common."""
    yield from (constant(task.stage, k) for k in range(num_constants))
    yield from (f"param{p}" for p in stage.params)
    yield from (f"batch{i}" for i in stage.batch)
    yield from [f"microbatch{task.microbatch}"] * indexed


def _saved(task: Task, gradient: StageGradient) -> list[str]:
    return [f"stage{task.stage}.saved{k}.{task.microbatch}" for k in range(gradient.num_saved)]


def _forward(rows: Rows, device: int, task: Task, parts: Parts) -> list[tuple[int, str]]:
    """Write a forward; returns the activations it makes, each with a stage that reads it."""
    s, m = task.stage, task.microbatch
    stage = parts.stages.stages[s]
    gradient = parts.gradients[s] if parts.gradients else None
    constants = stage.constants if gradient is None else gradient.constants
    rows.run(
        device,
        stage_program_name(s, "F"),
        [
            *_held(task, stage, len(constants), parts.indexed[s]),
            *(activation(c, m) for c in stage.inputs),
        ],
        [
            *(activation(c, m) for c in stage.outputs),
            *(result(r, m) for r in stage.results),
            *([] if gradient is None else _saved(task, gradient)),
        ],
        task,
    )
    crossings = parts.stages.crossings
    return [(t, activation(c, m)) for c in stage.outputs for t in crossings[c].consumers]


def _backward(rows: Rows, device: int, task: Task, parts: Parts) -> list[tuple[int, str]]:
    """Write a backward; returns the cotangents it makes, each with the stage that reads it."""
    assert parts.gradients is not None
    s, m = task.stage, task.microbatch
    gradient = parts.gradients[s]
    stage = gradient.stage
    sums = [gradient_sum(p, device) for p in stage.params]
    rows.run(
        device,
        stage_program_name(s, "B"),
        [
            *_held(task, stage, len(gradient.constants), parts.indexed[s]),
            *(activation(stage.inputs[i], m) for i in gradient.kept_inputs),
            *(activation(stage.outputs[i], m) for i in gradient.kept_outputs),
            *_saved(task, gradient),
            *(cotangent(d, m) for d in gradient.d_outputs),
            *["d_loss"] * stage.makes_loss,
            *sums,
        ],
        [*(cotangent(d, m) for d in gradient.d_inputs), *sums],
        task,
    )
    crossings = parts.stages.crossings
    return [(crossings[d.crossing].producer, cotangent(d, m)) for d in gradient.d_inputs]


def emit_split(
    rows: Rows, split: DeviceSplit, prefix: str, *, inputs: Sequence[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Write the phases of a split.

    Args:
      rows: where to write.
      split: the programs and moves.
      prefix: begins the names of its programs and buffers.
      inputs: the buffers that its inputs are.

    Returns:
      For each output its buffer, and the devices that hold it.
    """
    names: Mapping[str, str] = {
        place.name: buffer for place, buffer in zip(split.inputs, inputs, strict=True)
    }

    def named(name: str) -> str:
        return names.get(name, f"{prefix}.{name}")

    for index, phase in enumerate(split.phases):
        for program in phase.programs:
            rows.run(
                program.device,
                split_program_name(prefix, index, program.device),
                [named(n) for n in program.inputs],
                [named(n) for n in program.outputs],
            )
        for move in phase.moves:
            rows.transfer(move.source, move.target, named(move.name))
    return [(named(place.name), place.homes) for place in split.outputs]


def split_program_name(prefix: str, phase: int, device: int) -> str:
    """The program of a device in a phase of a split."""
    return f"{prefix}.phase{phase}.device{device}"
