"""Boxes, against the arrays that they are parts of."""

import itertools

import numpy as np
import pytest

from passes.boxes import assemble, index_text, meet, partition, reshaped, shifted, sizes, whole

SHAPES = [(6,), (2, 3), (6, 1), (2, 1, 3), (12,), (3, 4), (2, 6), (2, 3, 2), (4, 3), ()]


def index(box):
    return tuple(slice(start, stop) for start, stop in box)


def boxes(shape):
    spans = [itertools.combinations(range(n + 1), 2) for n in shape]
    return list(itertools.product(*spans))


def elements(array, box):
    return array[index(box)].ravel().tolist()


def equal_sizes():
    return [(a, b) for a in SHAPES for b in SHAPES if np.prod(a) == np.prod(b)]


@pytest.mark.parametrize(("shape", "new_shape"), equal_sizes())
def test_a_reshaped_box_has_the_same_elements(shape, new_shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    after = array.reshape(new_shape)
    known = {tuple(elements(after, box)): box for box in boxes(new_shape)}
    for box in boxes(shape):
        # No box of the new shape is found if and only if there is none.
        assert reshaped(box, shape, new_shape) == known.get(tuple(elements(array, box)))


def test_meet_and_shift():
    array = np.arange(30).reshape(5, 6)
    for a, b in itertools.product(boxes((5, 6))[::7], repeat=2):
        common = meet(a, b)
        both = sorted(set(elements(array, a)) & set(elements(array, b)))
        assert both == ([] if common is None else elements(array, common))
        assert sizes(shifted(a, (2, -1))) == array[index(a)].shape


@pytest.mark.parametrize(
    ("reads", "count"),
    [
        ([], 1),
        ([((0, 2), (0, 6))], 1),  # a single slice
        ([((0, 2), (0, 6)), ((0, 5), (0, 6))], 1),  # also read whole
        ([((k, k + 1), (0, 6)) for k in range(5)], 5),
        ([((1, 2), (0, 6)), ((3, 4), (0, 6))], 5),  # the rest is in three pieces
        ([((0, 3), (0, 6)), ((2, 5), (0, 6))], 3),  # they overlap
        ([((0, 5), (0, 3)), ((0, 5), (3, 6))], 2),
        ([((0, 2), (0, 3)), ((0, 2), (3, 6)), ((2, 5), (0, 6))], 3),  # nested
    ],
)
def test_a_partition_covers_the_array_and_fits_the_reads(reads, count):
    pieces = partition(whole((5, 6)), reads)
    array = np.arange(30).reshape(5, 6)
    assert len(pieces) == count
    assert sorted(e for piece in pieces for e in elements(array, piece)) == list(range(30))
    for read in reads if count > 1 else []:
        inside = [p for p in pieces if meet(p, read) is not None]
        assert all(meet(p, read) == p for p in inside)
        held = [(p, array[index(p)]) for p in inside]
        got = assemble(read, held, cut=lambda x, box: x[index(box)], join=np.concatenate)
        np.testing.assert_array_equal(got, array[index(read)])


def test_assembling_cuts_what_is_too_much():
    array = np.arange(30).reshape(5, 6)
    pieces = [(((k, k + 1), (0, 6)), array[k : k + 1]) for k in range(5)]
    for box in boxes((5, 6)):
        met = [(b, x) for b, x in pieces if meet(b, box) is not None]
        got = assemble(box, met, cut=lambda x, b: x[index(b)], join=np.concatenate)
        np.testing.assert_array_equal(got, array[index(box)])


@pytest.mark.parametrize(
    ("box", "text"),
    [
        (((4, 5), (0, 3)), "[4]"),
        (((0, 6), (1, 3)), "[:,1:3]"),
        (((2, 4), (0, 1)), "[2:4,0]"),
        (((0, 6), (0, 3)), ""),
    ],
)
def test_names(box, text):
    assert index_text(box, (6, 3)) == text
