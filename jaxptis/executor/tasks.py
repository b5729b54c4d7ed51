"""What the tasks of a plan run, and the buffers that they read and write, by name.

Names, on the device of the reader:

    param3  sum3.device1  a parameter, and the sum of its gradients so far on a device
    batch0  microbatch.2  a leaf of the batch, and the index of a microbatch
    stage1.constant0      an array that the loss function closes over
    x4.2                  crossing 4 of microbatch 2
    d4.stage3.2           its gradient, as stage 3 sees it
    stage1.saved0.2       what a forward saves for its backward
    stage1.kept0.2        what an input gradient keeps for its weight gradient
    result0.2  result0    the loss (1, 2, ...: auxiliary leaves) of microbatch 2, and of the step
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ref:
    """A buffer as a stage names it: one for each microbatch, or one for all."""

    name: str
    per_microbatch: bool

    def of(self, microbatch: int) -> str:
        """Return the name of the buffer that a task on this microbatch uses."""
        return f"{self.name}.{microbatch}" if self.per_microbatch else self.name


@dataclass(frozen=True, kw_only=True)
class TaskProgram:
    """What the tasks of one kind in one stage run.

    Attributes:
        name: of the program.
        reads: its inputs.
        writes: its results.
        sends: what the next stage reads of a forward's results, or the one before of a backward's.
    """

    name: str
    reads: tuple[Ref, ...]
    writes: tuple[Ref, ...]
    sends: tuple[Ref, ...]


TaskPrograms = Mapping[tuple[int, str], TaskProgram]
"""By stage and kind. A task without a program has nothing to do: the first stage has no input
gradient, a stage without parameters no weight gradient."""
