from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptis.optimizer import balance


def _score(weights: Sequence[float], boundaries: tuple[int, ...]) -> tuple[Fraction, Fraction]:
    """Return the heaviest stage and the sum of squares, exactly."""
    exact = [Fraction(weight) for weight in weights]
    stages = [sum(exact[start:end], Fraction(0)) for start, end in pairwise(boundaries)]
    return max(stages), sum((stage**2 for stage in stages), Fraction(0))


def _best(weights: Sequence[float], num_stages: int) -> tuple[Fraction, Fraction]:
    cuts = combinations(range(1, len(weights)), num_stages - 1)
    return min(_score(weights, (0, *cut, len(weights))) for cut in cuts)


_WEIGHTS = st.one_of(
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=9),
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1e-300, 1e300]), min_size=1, max_size=9),
)


@given(_WEIGHTS, st.data())
def test_brute_force(weights: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(weights)))
    boundaries = balance(weights, num_stages)
    assert (boundaries[0], boundaries[-1], len(boundaries)) == (0, len(weights), num_stages + 1)
    assert all(start < end for start, end in pairwise(boundaries))
    assert _score(weights, boundaries) == _best(weights, num_stages)


@pytest.mark.parametrize("heavy", [1, 1000])
@pytest.mark.parametrize("num_stages", [1, 2, 7, 64, 299, 300])
def test_many_layers(num_stages: int, heavy: int) -> None:
    """No smaller limit will do: filled greedily under it, the stages do not hold all layers."""
    rng = Random(num_stages)
    weights = [rng.randint(1, 100) for _ in range(299)] + [100 * heavy]
    heaviest, _ = _score(weights, balance(weights, num_stages))
    if heaviest == max(weights):
        return
    stages, held = 1, 0
    for weight in weights:
        if held + weight >= heaviest:
            stages, held = stages + 1, 0
        held += weight
    assert stages > num_stages


@pytest.mark.parametrize(
    ("weights", "num_stages", "boundaries"),
    [
        ([1, 1, 1, 1], 2, (0, 2, 4)),
        ([1] * 8 + [4], 3, (0, 4, 8, 9)),
        ([9, 1, 1, 1, 1], 3, (0, 1, 3, 5)),  # 9 | 2 | 2 and not 9 | 1 | 3
        ([0, 0, 0], 3, (0, 1, 2, 3)),
        ([0.1, 0.2, 0.3], 2, (0, 2, 3)),
    ],
)
def test_known(weights: list[float], num_stages: int, boundaries: tuple[int, ...]) -> None:
    assert balance(weights, num_stages) == boundaries


def test_fewer_layers_than_stages() -> None:
    message = "^5 layers cannot fill 8 stages; lower num_stages to 5 or less$"
    with pytest.raises(ValueError, match=message):
        balance([1.0] * 5, 8)


@pytest.mark.parametrize("num_stages", [0, -1])
def test_no_stages(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"num_stages is {num_stages}; use 1 or more"):
        balance([1.0], num_stages)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_bad_weight(weight: float) -> None:
    with pytest.raises(ValueError, match=f"layer 1 weighs {weight}; use a finite weight"):
        balance([1.0, weight], 1)
