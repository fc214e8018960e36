"""What the launcher remembers of its ranks' output, however it is cut into pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.launch.output import Output

TRACEBACK = b"""loading
Traceback (most recent call last):
  File "serve.py", line 51, in serve
    session.run(steps)
ValueError: no such thing
leaving
"""


@pytest.fixture(scope="module")
def nowhere() -> Iterator[int]:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@given(rank=st.integers(0, 1), cuts=st.lists(st.integers(0, len(TRACEBACK)), max_size=5))
def test_an_exception_is_remembered_whole(nowhere: int, rank: int, cuts: list[int]) -> None:
    output = Output(["a", "b"], nowhere, nowhere)
    places = [0, *sorted(cuts), len(TRACEBACK)]
    for first, last in zip(places, places[1:], strict=False):
        piece = TRACEBACK[first:last]
        output.tagged(rank, "err", piece) if rank else output.untagged(piece)
    assert output.last_words(rank) == "ValueError: no such thing"


def test_a_reason_counts_when_its_line_has_no_end(nowhere: int) -> None:
    output = Output(["a"], nowhere, nowhere)
    output.untagged(b"lockstep: error: too ")
    output.untagged(b"large")
    assert output.complaint(0) == ""
    output.finish(0)
    assert output.complaint(0) == "too large"
