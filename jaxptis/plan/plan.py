"""The plan: partition (layers to stages), placement (stages to devices) and schedule."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Literal, Self, get_args

from jaxptis.plan.order import execution_order
from jaxptis.plan.task import Schedule, Task

Recompute = Literal["none", "cheap", "all"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Consecutive layers, by name, and the device that runs them.

    Attributes:
        layers: their names, in the order of the model.
        device: the index of the device.
        recompute: what the backward computes again, for the forward to save less: "all" of the
            forward, so that only the inputs of the stage are saved; what is "cheap" (elementwise
            arithmetic), so that the fewest bytes are saved for which no more is necessary; "none".
    """

    layers: tuple[str, ...]
    device: int
    recompute: Recompute = "cheap"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is trained as a pipeline; checked when it is made.

    Attributes:
        stages: the layers and the device of every stage, in the order of the model.
        schedule: the tasks of every device, one row a device, in the order it runs them.

    Raises:
        ValueError: the plan cannot run; see `check`.
    """

    stages: tuple[StagePlan, ...]
    schedule: Schedule

    def __post_init__(self) -> None:
        self.check()

    @property
    def num_devices(self) -> int:
        return len(self.schedule)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @cached_property
    def num_microbatches(self) -> int:
        return 1 + max((task.microbatch for row in self.schedule for task in row), default=-1)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers in the order of the model."""
        return tuple(name for stage in self.stages for name in stage.layers)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The index of every stage's first layer, then the number of layers."""
        return tuple(accumulate((len(stage.layers) for stage in self.stages), initial=0))

    @cached_property
    def order(self) -> tuple[Task, ...]:
        """All tasks, each after those it needs and those before it in its row."""
        return execution_order(self.schedule)

    def forward_only(self) -> Self:
        """Return the plan without its backward, for evaluation."""
        rows = (tuple(task for task in row if task.kind == "F") for row in self.schedule)
        return replace(self, schedule=tuple(rows))

    def check(self) -> None:
        """Check that the plan can run.

        Every stage has layers, and no layer stands twice. Every stage runs every microbatch on its
        device: one F, and one B or one I and one W (or no stage has a backward, for evaluation).
        The rows do not wait for each other in a circle.

        Raises:
            ValueError: says what is wrong and names the stage, layer or tasks.
        """
        _check_stages(self)
        _check_devices(self)
        _check_complete(self)
        _ = self.order  # raises where the rows wait for each other

    def text(self) -> str:
        """Return the form that a person reads, edits and compares; see `jaxptis.plan.text`."""
        from jaxptis.plan.text import to_text  # text.py imports Plan

        return to_text(self)

    def __str__(self) -> str:
        return self.text()

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read the form that `text` gives.

        Raises:
            ValueError: says where the text is malformed, or why the plan cannot run.
        """
        from jaxptis.plan.text import from_text

        return from_text(text)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """Read a file that `save` wrote; raises like `parse`, with the path in the message."""
        from jaxptis.plan.text import from_text

        return from_text(Path(path).read_text(encoding="utf-8"), source=str(path))

    def save(self, path: str | PathLike[str]) -> None:
        """Write `text` to a file."""
        Path(path).write_text(self.text(), encoding="utf-8")


def _check_stages(plan: Plan) -> None:
    if not plan.stages:
        raise ValueError("the plan has no stages; give it at least one")
    stage_of: dict[str, int] = {}
    for index, stage in enumerate(plan.stages):
        if not stage.layers:
            raise ValueError(f"stage {index} has no layers; give it one or remove the stage")
        if stage.device not in range(plan.num_devices):
            raise ValueError(
                f"stage {index} is on device {stage.device}, but the schedule has rows for "
                f"{plan.num_devices} devices, counted from 0; move the stage or add the row"
            )
        if stage.recompute not in get_args(Recompute):
            raise ValueError(
                f"stage {index} is to recompute {stage.recompute!r}; use one of "
                f"{', '.join(get_args(Recompute))}"
            )
        for name in stage.layers:
            if name.split() != [name] or name.startswith("#"):
                raise ValueError(
                    f"layer {name!r} of stage {index} cannot be written in a plan file; "
                    "use a name without whitespace that does not start with '#'"
                )
            if name in stage_of:
                raise ValueError(
                    f"layer {name!r} stands twice, in stage {stage_of[name]} and in stage {index}; "
                    "remove one"
                )
            stage_of[name] = index


def _check_devices(plan: Plan) -> None:
    """Check that every task stands once, on the device of its stage."""
    seen: set[Task] = set()
    for device, row in enumerate(plan.schedule):
        for task in row:
            if task.stage >= plan.num_stages:
                raise ValueError(
                    f"device {device} runs {task}, but the plan has {plan.num_stages} stages, "
                    "counted from 0; remove the task or add the stage"
                )
            home = plan.stages[task.stage].device
            if home != device:
                raise ValueError(
                    f"device {device} runs {task}, but stage {task.stage} is on device {home}; "
                    f"move {task} to the row of device {home}"
                )
            if task in seen:
                raise ValueError(f"device {device} runs {task} twice; remove one")
            seen.add(task)


def _check_complete(plan: Plan) -> None:
    """Check that no task is missing. Stops at the first that is, however large the numbers."""
    tasks = frozenset(task for row in plan.schedule for task in row)
    if not tasks:
        raise ValueError("the schedule has no tasks; give every stage a forward of microbatch 0")
    trains = any(task.kind != "F" for task in tasks)
    for index, stage in enumerate(plan.stages):
        for microbatch in range(plan.num_microbatches):
            forward, full, input_grad, weight_grad = (
                Task(index, kind, microbatch) for kind in "FBIW"
            )
            if forward not in tasks:
                raise ValueError(
                    f"{forward} is missing; add it to the row of device {stage.device} "
                    f"({plan.num_microbatches} microbatches run through every stage)"
                )
            found = [task for task in (full, input_grad, weight_grad) if task in tasks]
            if trains and found not in ([full], [input_grad, weight_grad]):
                raise ValueError(
                    f"the backward of microbatch {microbatch} in stage {index} is "
                    f"{' and '.join(map(str, found)) or 'missing'}; device {stage.device} must run "
                    f"either {full}, or {input_grad} and {weight_grad}"
                )
