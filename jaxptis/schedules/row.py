"""A device's row, written as stages and kinds: the microbatches follow by counting."""

from collections import Counter

from jaxptis.plan import Task


class Row:
    """The tasks of one device so far.

    >>> row = Row()
    >>> row.run(0, "FFI")
    >>> row.run(0, "W")
    >>> print(*row.tasks)
    0F0 0F1 0I0 0W0
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self._started: Counter[tuple[int, bool]] = Counter()
        self._split: list[Task] = []  # input gradients whose weight gradient has yet to run

    def count(self, stage: int, kind: str) -> int:
        """Return how many forwards (F), or backwards whole or split (B, I), a stage has run."""
        return self._started[stage, kind == "F"]

    def run(self, stage: int, kinds: str) -> None:
        """Add, for each kind, the stage's next microbatch. A split backward counts as one."""
        for kind in kinds:
            if kind == "W":
                self._run_weight_grad(next(task for task in self._split if task.stage == stage))
                continue
            task = Task(stage, kind, self.count(stage, kind))
            self._started[stage, kind == "F"] += 1
            self.tasks.append(task)
            if kind == "I":
                self._split.append(task)

    def run_oldest_weight_grad(self) -> None:
        """Add the weight gradient that has waited longest, of whichever stage."""
        self._run_weight_grad(self._split[0])

    def _run_weight_grad(self, input_grad: Task) -> None:
        self._split.remove(input_grad)
        self.tasks.append(Task(input_grad.stage, "W", input_grad.microbatch))
