"""What AdaPtis changes: a partition, a placement, and the rule of a list schedule."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np

from jaxptis.optimizer.steps.candidate import HOME, NUM_COLUMNS, WHOLE, WINDOW, Candidate
from jaxptis.optimizer.steps.list_kernel import OLDEST, Rule
from jaxptis.optimizer.steps.problem import Problem


class Draft(NamedTuple):
    """Where stages begin, on which devices they are, and by what rule their tasks are ordered.

    Attributes:
        edges: the first layer of every stage, then the number of layers.
        homes: the device of every stage; of two in a row never the same.
        rule: of the list schedule.
        more_ahead: how many forwards a stage may run ahead of its backwards beyond those of 1F1B,
            which are as many as there are stages from it to the last; negative for fewer. None sets
            no limit.
        whole: whether backwards are whole.
    """

    edges: tuple[int, ...]
    homes: tuple[int, ...]
    rule: Rule = Rule(True, OLDEST, OLDEST, patience=0.0, stretch=0.0)
    more_ahead: int | None = None
    whole: bool = False

    def stages_of(self, device: int) -> list[int]:
        return [stage for stage, home in enumerate(self.homes) if home == device]

    def placed(self, edges: Sequence[int], homes: Sequence[int]) -> Self:
        """Return it with other stages; those in a row on one device become one."""
        starts = [0, *(stage for stage, (a, b) in enumerate(pairwise(homes), 1) if a != b)]
        return self._replace(
            edges=(*(edges[start] for start in starts), edges[-1]),
            homes=tuple(homes[start] for start in starts),
        )

    def candidate(self, problem: Problem) -> Candidate:
        """Return it in the form in which steps are estimated."""
        layers = np.zeros((problem.num_layers, NUM_COLUMNS), np.int64)
        for stage, (start, end) in enumerate(pairwise(self.edges)):
            window = problem.num_microbatches
            if self.more_ahead is not None:
                window = max(1, min(window, len(self.homes) - stage + self.more_ahead))
            layers[start:end, HOME] = self.homes[stage]
            layers[start:end, WINDOW] = window
            layers[start:end, WHOLE] = self.whole
        return Candidate(layers, self.rule)
