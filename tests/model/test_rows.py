from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from lockstep.model import rows
from lockstep.model.headers import TensorInfo

LENGTH = 6
RANGES = st.lists(
    st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(lambda ends: (min(ends), max(ends))),
    min_size=1,
    max_size=3,
)


@given(st.lists(st.integers(1, 4), max_size=2), st.lists(st.integers(1, 4), max_size=2), RANGES)
def test_rows_along_an_axis_are_those_of_numpy(before, after, ranges):
    shape = (*before, LENGTH, *after, 3)
    whole = np.arange(np.prod(shape)).reshape(shape)
    axis = len(before) - len(shape)
    expected = np.concatenate([np.take(whole, range(*each), axis) for each in ranges], axis)
    matrix = whole.reshape(-1, 3)
    found = [matrix[first:last] for first, last in rows.along(shape, axis, ranges)]
    assert np.array_equal(np.concatenate(found), expected.reshape(-1, 3))


def test_rows_are_where_they_lie_in_their_tensor():
    stack = TensorInfo("model.safetensors", "BF16", (2, 5, 3), 100, 60)
    assert rows.of(stack, (4, 7)) == TensorInfo("model.safetensors", "BF16", (3, 3), 124, 18)


def test_a_name_tells_the_tensor_and_its_rows():
    assert rows.named(rows.name_of("a.b[0:1]", (5, 12))) == ("a.b[0:1]", (5, 12))
    assert rows.named("model.layers.0.weight") is None


@example([(1, 1)], [0, 3])
@given(RANGES, st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(sorted))
def test_what_is_held_and_what_is_lacking_are_all_rows_that_are_asked_for(ranges, asked):
    matrix = TensorInfo("part", "U8", (LENGTH, 1), 0, LENGTH)
    held = {each: rows.of(matrix, each) for each in ranges}
    found, lacking = rows.cover(held, tuple(asked))
    here = [rows.of(tensor, place) for tensor, place in found]
    places = [*((part.offset, part.offset + part.nbytes) for part in here), *lacking]
    assert [row for first, last in sorted(places) for row in range(first, last)] == [*range(*asked)]
    assert all(not range(max(a, c), min(b, d)) for a, b in ranges for c, d in lacking)
