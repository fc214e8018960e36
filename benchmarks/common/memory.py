"""How much memory the cores of a virtual machine read at a time.

Cores that the host has put on one core complex share its path to memory, which one core alone nearly fills.
On two, each has its own. They compute as fast in both cases. The host moves them every few seconds, most of
all when they have been idle for a moment.
"""

from __future__ import annotations

import sys
import time

from common import machine
from common.processes import Program
from common.servers import PROGRAMS

SAMPLE_S = 0.15
PAUSE_S = 0.05
START_S = 30.0

OF_ITS_OWN = 0.75
"""Cores have a path to memory each if together they read this much of what as many would alone."""


class Memory:
    """A reader of memory on each of `count` cores. A context manager."""

    def __init__(self, count: int) -> None:
        program = str(PROGRAMS / "read_memory.py")
        self._readers = [
            Program([sys.executable, program, f"{core}"], stdin=True) for core in machine.cores()[:count]
        ]
        self._alone = 0.0

    def __enter__(self) -> Memory:
        for reader in self._readers:
            reader.listen(START_S)
        self._alone = max(self._read(self._readers[:1]) for _ in range(10))
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.stop()

    def given(self) -> float:
        """What they read at a time, in what the first one reads alone: their number, or less."""
        return self._read(self._readers) / self._alone

    def awaited(self, ranks: int, patience_s: float) -> float:
        """The same, once it is enough for so many ranks or the patience is at its end."""
        deadline_s = time.monotonic() + patience_s
        while not is_own(given := self.given(), ranks) and time.monotonic() < deadline_s:
            time.sleep(PAUSE_S)
        return given

    def _read(self, readers: list[Program]) -> float:
        for reader in readers:
            reader.tell(f"{SAMPLE_S}")
        return sum(float(reader.listen(START_S)) for reader in readers)


def is_own(given: float, ranks: int) -> bool:
    """Whether each of so many ranks has its own path to memory."""
    return given >= OF_ITS_OWN * ranks
