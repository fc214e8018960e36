"""Ending this process at once, whatever has become of its output."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

LAST_WORDS_S = 1.0
"""For the last lines to be taken. A paused terminal, for one, takes none."""

FINALIZE_S = 10.0
"""For the backend's finalizer, which waits for the other ranks."""

UNFINALIZED = int(signal.SIGALRM)
"""Exit status of a rank that has done all it had to, but for the backend's finalizer."""


def leave(status: int, text: str = "") -> NoReturn:
    """End with `status`, after `text` has been written to standard error if that can be done soon."""
    # Not through sys.stderr: another thread may be blocked while it holds its lock.
    leave_after(lambda: os.write(2, text.encode(errors="replace")) if text else None, status)


def leave_after(last: Callable[[], object], status: int) -> NoReturn:
    """End with `status` once `last` is done, has failed or has taken too long; no thread is waited for."""

    def attempt() -> None:
        with contextlib.suppress(OSError, ValueError):  # Nobody reads, no room, or a stream that is closed.
            last()

    try:
        thread = threading.Thread(target=attempt, name="last words", daemon=True)
        thread.start()
        thread.join(LAST_WORDS_S)
    finally:
        os._exit(status)


def bound_finalizer() -> None:
    """End with UNFINALIZED when the backend's finalizer takes too long, from this process's exit on."""
    atexit.register(_set_alarm)


def _set_alarm() -> None:
    with contextlib.suppress(OSError):  # Before the time runs: the reader may take as long as he likes.
        sys.stdout.flush()
    # No Python runs any more by then. So libc's _exit is the handler, and the signal's number its argument.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGALRM, ctypes.cast(libc._exit, ctypes.c_void_p))
    signal.setitimer(signal.ITIMER_REAL, FINALIZE_S)
