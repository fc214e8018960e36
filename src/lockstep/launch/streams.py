"""What a started command writes, taken apart: ssh's words and its rank's, mpirun's and its ranks'."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from math import inf

from lockstep.launch import mpi_rank
from lockstep.launch.agent import HELLO

Take = Callable[[bytes], None]
"""Whatever a stream is handed to, piece by piece."""

_BEAT, _BEGUN = re.compile(rb"\x1e(\d{1,9})\n"), re.compile(rb"\x1e\d{0,9}$")


class Greeting:
    """Keeps what ssh says before the agent's greeting, as `noise`, apart from what the rank says after it."""

    def __init__(self, noise: list[str], take: Take) -> None:
        """`take` gets what the rank says."""
        self.came = False
        """Whether the agent has greeted."""
        self._noise, self._take, self._before = noise, take, b""

    def __call__(self, data: bytes) -> None:
        if self.came:
            self._take(data)
            return
        self._before += data
        before, mark, after = self._before.partition(HELLO)
        self._noise[:] = before.decode(errors="replace").splitlines()
        self.came = bool(mark)
        if after:
            self._take(after)


class Records:
    """Keeps what mpirun says itself, as `noise`, apart from the records of its ranks (see mpi_rank.py)."""

    def __init__(self, size: int, noise: list[str], take: Callable[[int, str, bytes], None]) -> None:
        """`take` gets rank, kind and data of each record; `size` is the number of ranks."""
        self._size, self._noise, self._take, self._rest = size, noise, take, b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            before, *texts = line.split(mpi_rank.RECORD)
            if before.strip():
                self._noise.append(before.decode(errors="replace"))
            for text in texts:
                if found := mpi_rank.parse(text, self._size):
                    self._take(*found)


class Beats:
    """Takes a process's beats (see runtime/beats.py) out of its standard output."""

    def __init__(self, take: Take, first_s: float = inf) -> None:
        """`take` gets what is not a beat; the first one is due in `first_s`."""
        self._take, self._rest = take, b""
        self.heard_s = time.monotonic()
        """When the last beat came, or when this began."""
        self.due_s = self.heard_s + first_s
        """When the next one has to have come."""

    def __call__(self, data: bytes) -> None:
        data = self._rest + data
        for found in _BEAT.finditer(data):
            self.heard_s = time.monotonic()
            self.due_s = self.heard_s + int(found[1])
        text = _BEAT.sub(b"", data)
        begun = _BEGUN.search(text)
        text, self._rest = (text[: begun.start()], begun[0]) if begun else (text, b"")
        if text:
            self._take(text)
