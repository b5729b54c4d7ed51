"""Where transfers stand: at the first of the best places, found by trying all."""

from collections.abc import Sequence
from random import Random

from jaxptis.performance import Span, simulate
from jaxptis.performance.transfers import Places, in_sequence
from tests.performance.random_steps import random_step


def delay_s(sequence: Sequence[tuple[int, Span]], ends: tuple[int, int], position: int) -> float:
    """Return by how much a transfer before this position holds up the next tasks of its ends."""
    there_s = max((span.end_s for device, span in sequence[:position] if device in ends), default=0)
    following = (
        next((span for device, span in sequence[position:] if device == end), None) for end in ends
    )
    return sum(max(0.0, there_s - span.start_s) for span in following if span is not None)


def test_the_first_of_the_best_places() -> None:
    num_places = num_moved = 0
    for seed in range(700):
        rng = Random(seed)
        step = random_step(rng)
        timeline = simulate(step.plan, step.costs, step.cluster)
        sequence = in_sequence(step.plan, timeline.spans)
        places = Places(sequence)
        for _ in range(4):
            made, read = sorted(rng.choices(range(len(sequence)), k=2))
            ends = sequence[made][0], sequence[read][0]
            if ends[0] == ends[1]:
                continue
            delays = [delay_s(sequence, ends, p) for p in range(made + 1, read + 1)]
            best = places.best(*ends, made, read)
            assert best == made + 1 + delays.index(min(delays)), seed
            num_places += 1
            num_moved += best > made + 1
    assert num_places > 560
    assert num_moved > 140  # else the first place would do
