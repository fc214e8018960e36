"""Lines for a reader who may pause: nobody waits for him, and he is told what he has missed."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from lockstep.launch.writer import Writer
from waiting import wait_until

LINE = b"x" * 99 + b"\n"
LINES = 5000
LIMIT_BYTES = 100 * len(LINE)
NOTE = rb"lockstep: left out (\d+) lines here, which nobody had read in time\n"


@dataclass
class Pipe:
    """A writer, and the end of its pipe to be read or closed."""

    writer: Writer
    end: int

    def read(self, ending: bytes) -> bytes:
        """All that comes, up to `ending`."""
        data = b""
        while not data.endswith(ending):
            data += os.read(self.end, 65536)
        return data

    def read_lines(self) -> list[bytes]:
        """All lines until LINES of them have come or are said to have been left out."""
        data = b""
        while kept(data) + sum(map(int, re.findall(NOTE, data))) < LINES:
            data += os.read(self.end, 65536)
        return data.splitlines(keepends=True)


def kept(data: bytes) -> int:
    return data.count(LINE)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    end, begin = os.pipe()
    writer = Writer(begin, LIMIT_BYTES)
    yield Pipe(writer, end)
    writer.flush(10)
    os.close(begin)
    os.close(end)


@pytest.mark.timeout(30)
def test_what_is_written_comes_in_order_and_whole(pipe: Pipe) -> None:
    for number in range(5):
        pipe.writer.write(b"line %d\n" % number)
    assert pipe.read(b"4\n") == b"".join(b"line %d\n" % number for number in range(5))


@pytest.mark.timeout(30)
def test_a_reader_who_pauses_keeps_nobody_and_is_told_what_was_left_out(pipe: Pipe) -> None:
    for _ in range(LINES):
        pipe.writer.write(LINE)
    lines = pipe.read_lines()
    pipe.writer.write(b"the next one\n")
    assert pipe.read(b"\n") == b"the next one\n"
    assert LIMIT_BYTES <= lines.count(LINE) * len(LINE) < LINES * len(LINE)
    assert all(line == LINE or re.fullmatch(NOTE, line) for line in lines)


@pytest.mark.timeout(30)
def test_the_wait_for_a_reader_who_pauses_is_bounded(pipe: Pipe) -> None:
    for _ in range(LINES):
        pipe.writer.write(LINE)
    began_s = time.monotonic()
    pipe.writer.flush(0.2)
    assert time.monotonic() - began_s < 10
    reader = threading.Thread(target=pipe.read_lines)
    reader.start()
    pipe.writer.flush(20)
    reader.join(20)
    assert not reader.is_alive()


@pytest.mark.timeout(30)
def test_a_reader_who_has_gone_is_known_from_the_next_line_on() -> None:
    end, begin = os.pipe()
    os.close(end)
    writer = Writer(begin)
    writer.write(LINE)
    writer.flush(10)

    def refused() -> bool:
        try:
            writer.write(LINE)
        except BrokenPipeError:
            return True
        return False

    wait_until(refused)
    writer.flush(10)
    os.close(begin)
