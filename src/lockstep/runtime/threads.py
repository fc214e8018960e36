"""Which of a process's threads goes first where they share a core."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_THREADS = Path("/proc/self/task")

NICENESS = 5
"""A third of the share of other threads: enough to stay out of the way, and not starved by other programs."""


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """Threads that are started in this block let the others go first. Only on Linux: it has that per thread.

    mlx's ring polls its sockets in threads of its own, which take turns with the computation on one core.
    """
    before = _threads()
    yield
    for thread in _threads() - before:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)


def _threads() -> set[int]:
    return {int(thread.name) for thread in _THREADS.iterdir()} if _THREADS.is_dir() else set()
