"""What the launcher remembers of its ranks' output, however it is cut into pieces."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.launch import launcher
from lockstep.launch.hostfile import local_hosts
from lockstep.launch.job import Job
from lockstep.launch.output import Output
from lockstep.launch.writer import Writer

TRACEBACK = b"""loading
Traceback (most recent call last):
  File "serve.py", line 51, in serve
    session.run(steps)
ValueError: no such thing
leaving
"""


@given(rank=st.integers(0, 1), cuts=st.lists(st.integers(0, len(TRACEBACK)), max_size=5))
def test_an_exception_is_remembered_whole(nowhere: Writer, rank: int, cuts: list[int]) -> None:
    output = Output(["a", "b"], err=nowhere)
    places = [0, *sorted(cuts), len(TRACEBACK)]
    for first, last in zip(places, places[1:], strict=False):
        piece = TRACEBACK[first:last]
        output.tagged(rank, "err", piece) if rank else output.untagged(piece)
    assert output.last_words(rank) == "ValueError: no such thing"


def test_a_reason_counts_when_its_line_has_no_end(nowhere: Writer) -> None:
    output = Output(["a"], err=nowhere)
    output.untagged(b"lockstep: error: too ")
    output.untagged(b"large")
    assert output.complaint(0) == ""
    output.finish(0)
    assert output.complaint(0) == "too large"


def test_ranks_may_speak_while_another_one_ends(nowhere: Writer) -> None:
    """Without one order of all of them, an end fails as it looks through what others change."""
    output, failures, until_s = Output(["a"] * 8, err=nowhere), [], time.monotonic() + 3

    def speak(rank: int) -> None:
        while time.monotonic() < until_s:
            output.tagged(rank, "err", b"a line\nhalf")
            output.tagged(rank, "out", b"half")
            output.tagged(rank, "out", b"\n")
            output.tagged(rank, "err", b"\n")

    def end() -> None:
        while time.monotonic() < until_s and not failures:
            try:
                output.finish(7)
            except RuntimeError as error:
                failures.append(error)

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=speak, args=(rank,)) for rank in range(1, 7)]
        threads.append(threading.Thread(target=end))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert not failures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_end_is_told_although_the_last_output_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Output, "finish", fail)
    running = launcher.start(Job(("-c", "raise SystemExit(3)"), local_hosts(2), stdin=False))
    over = threading.Thread(target=running.wait, daemon=True)
    over.start()
    over.join(30)
    running.end()
    assert not over.is_alive()
