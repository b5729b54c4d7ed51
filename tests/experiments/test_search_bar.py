import io
import math

import pytest
from rich.console import Console

from experiments.search_bar import search_bar
from jaxptis.optimizer.certificate import Bound, Certificate


@pytest.mark.parametrize(
    ("best_s", "text"),
    [
        (0.9, "best so far 900 ms, gap at most 12.50%"),
        (math.inf, "nothing that fits so far"),
    ],
)
def test_the_best_so_far_and_its_gap(best_s, text):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with search_bar(console, Certificate((Bound(0.8, "the work"),))) as show:
        show(0.5, best_s)
    assert text in file.getvalue()


def test_a_file_has_no_bar():
    file = io.StringIO()
    with search_bar(Console(file=file), Certificate((Bound(0.8, "the work"),))) as show:
        show(0.5, 0.9)
    assert not file.getvalue().strip()
