"""Standard error, written by a thread of its own: whoever has a line for it never waits for its reader."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque

LIMIT_BYTES = 4 << 20
"""Of what waits to be written. Beyond that, lines are left out until it has been read."""

FLUSH_S = 5.0
"""How long to wait at the end of a run for a reader who has paused."""


@functools.cache
def stderr() -> Writer:
    """The one of this process, so that the lines of all runs keep their order."""
    return Writer(2)


class Writer:
    """Writes to a file descriptor, in order, each piece whole. All methods may be called by any thread.

    What cannot be written, as on a full disk, is lost. What comes while too much waits for a paused reader
    is left out, which a line says in its place.
    """

    def __init__(self, descriptor: int, limit_bytes: int = LIMIT_BYTES) -> None:
        self.descriptor = descriptor
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._left_out = 0
        self._gone = False
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        """Have this written. Raises BrokenPipeError once it is known that nobody reads any more."""
        with self._changed:
            if self._gone:
                raise BrokenPipeError
            full = bool(self._waiting) and self._bytes + len(data) > self._limit_bytes
            if full or self._left_out:
                self._left_out += max(1, data.count(b"\n"))
                return
            self._waiting.append(data)
            self._bytes += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = FLUSH_S) -> None:
        """Return when all has been written, or after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._left_out, timeout_s)

    def _run(self) -> None:
        ends_line = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = self._waiting[0]
            try:
                write(self.descriptor, data)
            except BrokenPipeError:
                self._end()
                return
            ends_line = data.endswith(b"\n")
            with self._changed:
                self._waiting.popleft()
                self._bytes -= len(data)
                if self._left_out and not self._waiting:
                    self._add_note(ends_line)
                self._changed.notify_all()

    def _add_note(self, ends_line: bool) -> None:
        start = "" if ends_line else "\n"
        note = (
            f"{start}lockstep: left out {self._left_out} lines here, which nobody had read in time\n".encode()
        )
        self._left_out = 0
        self._waiting.append(note)
        self._bytes += len(note)

    def _end(self) -> None:
        with self._changed:
            self._gone = True
            self._waiting.clear()
            self._left_out = self._bytes = 0
            self._changed.notify_all()


def write(descriptor: int, data: bytes) -> OSError | None:
    """Write all of it. Raises BrokenPipeError; the error of a full disk or a lost terminal is returned."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        raise
    except OSError as error:  # ENOSPC, EDQUOT, EIO: of standard error, there is nowhere to tell it.
        return error
    return None
