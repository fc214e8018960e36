"""In which order the threads of a rank get a core that they share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

POLLING_NICENESS = 5
"""Above that of other threads. A third of their share: enough to stay out of the way of the computation."""

HIGHEST_NICENESS = 19


def take_turns() -> None:
    """Let this thread, and those that it starts from now on, keep a core until they wait or their time is up.

    mlx's thread computes what the main thread hands over, operation by operation, and on one core Linux would
    change from one to the other at each of them: 8000 times for a token of 16 layers in 4 bits. What a user
    has set stays as it is. Only on Linux.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextlib.contextmanager
def ring_in_order(ranks: int) -> Iterator[None]:
    """Order the threads that mlx's ring starts in this block; `ranks` run on this host.

    It has two threads for each socket: one hands out the pieces of a message, the other polls the socket
    while something is under way. On one core, a poll for what the peer has not sent yet kept the own message
    from leaving for a whole time slice. So whoever has something to send goes first: then a sum of 24 KB
    between computations takes 80 us, where it took 230.

    Only on Linux, where a thread has a priority of its own, and if there is a core for each rank: beside
    another rank that polls, threads that hand out messages would hardly run at all.
    """
    if sys.platform != "linux" or ranks > (os.cpu_count() or 1):
        yield
        return
    before = _threads()
    yield
    started = sorted(_threads() - before)
    handing_out, polling = started[: len(started) // 2], started[len(started) // 2 :]
    for thread in handing_out:
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + POLLING_NICENESS, HIGHEST_NICENESS)
    for thread in polling:
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _threads() -> set[int]:
    return {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
