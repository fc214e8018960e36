"""Read memory on one core: CORE. For each line "SECONDS" on stdin, bytes/s as one line on stdout.

Half of the seconds pass before it counts: a virtual core that was idle is slow at first.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
memory = np.ones(16_000_000, np.uint64)
"""More than any cache holds."""


def read(seconds: float) -> float:
    """Bytes/s."""
    began_s, passes = time.perf_counter(), 0
    while (took_s := time.perf_counter() - began_s) < seconds:
        memory.max()
        passes += 1
    return passes * memory.nbytes / took_s


print("ready", flush=True)
for line in sys.stdin:
    read(float(line) / 2)
    print(read(float(line) / 2), flush=True)
