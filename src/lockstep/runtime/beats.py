"""Beats: how a process shows its supervisor once a second that it is alive, on its standard output.

Each says for how long the next one may stay away, because only its sender knows what it is about to do.
Nothing else of a server is written there, and unlike standard error it is read even while the terminal that
shows the log is stopped. It comes through the agent, ssh and mpirun as it is; launch/streams.py reads it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

ENVIRONMENT = "LOCKSTEP_BEATS"
"""Set by a launcher that reads the beats of the processes that it starts."""

MARK = b"\x1e"
INTERVAL_S = 1.0
SILENCE_S = 20.0
"""How long a beat may stay away from a loop or a thread that makes one every second.

On a machine whose cores the ranks have taken, seconds are lost; and ssh, which may be what is stuck, notices
that by itself within 20 s and knows more.
"""


@dataclass(frozen=True)
class Beat:
    """Makes beats where they are `wanted`, and does nothing elsewhere."""

    wanted: bool = False

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Beat:
        return cls(ENVIRONMENT in env)

    def __call__(self, within_s: float = SILENCE_S) -> None:
        """One beat, and the promise of the next one `within_s`. Never blocks."""
        # Full only when the launcher has been stopped for hours, which must not stop this process too.
        if self.wanted and select.select([], [1], [], 0)[1]:
            with contextlib.suppress(BrokenPipeError):  # The launcher has gone, which others look after.
                os.write(1, encode(within_s))

    @contextlib.contextmanager
    def meanwhile(self, within_s: float = SILENCE_S, at_most_s: float = inf) -> Iterator[None]:
        """Let a thread make the beats, for `at_most_s`, while the body blocks."""
        over = threading.Event()
        thread = threading.Thread(target=self._repeat, args=(over, within_s, at_most_s), daemon=True)
        if self.wanted:
            thread.start()
        try:
            yield
        finally:
            over.set()

    def _repeat(self, over: threading.Event, within_s: float, at_most_s: float) -> None:
        end_s = time.monotonic() + at_most_s
        while not over.is_set() and time.monotonic() < end_s:
            self(within_s)
            over.wait(INTERVAL_S)


NO_BEAT = Beat()


def encode(within_s: float) -> bytes:
    return MARK + f"{within_s:.0f}\n".encode()
