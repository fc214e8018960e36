"""How many cores a virtual machine really has at a time.

For seconds or minutes two of them can be like one physical core: each alone is as fast as ever then, but both
together read little more memory than one.
"""

from __future__ import annotations

import sys

from common import machine
from common.processes import Program
from common.servers import PROGRAMS

SAMPLE_S = 0.5
START_S = 30.0


class Cores:
    """A reader of memory on each of `count` cores. A context manager."""

    def __init__(self, count: int) -> None:
        program = str(PROGRAMS / "read_memory.py")
        self._readers = [
            Program([sys.executable, program, f"{core}"], stdin=True) for core in machine.cores()[:count]
        ]
        self._alone = 0.0

    def __enter__(self) -> Cores:
        for reader in self._readers:
            reader.listen(START_S)
        self._alone = max(self._read(self._readers[:1]) for _ in range(5))
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.stop()

    def given(self) -> float:
        """What they read at a time, in what the first one reads alone: their number, or less."""
        return self._read(self._readers) / self._alone

    def _read(self, readers: list[Program]) -> float:
        for reader in readers:
            reader.tell(f"{SAMPLE_S}")
        return sum(float(reader.listen(START_S)) for reader in readers)
