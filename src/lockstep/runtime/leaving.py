"""Ending this process at once, whatever has become of its output."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import NoReturn

LAST_WORDS_S = 1.0
"""For the last lines to be taken. A paused terminal, for one, takes none."""


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
