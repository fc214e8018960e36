"""The ranks' output on the launcher's own: rank 0's as it is, the others' line by line with their rank."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from lockstep.errors import COMPLAINT
from lockstep.launch import writer
from lockstep.launch.writer import Writer

TAIL_LINES = 5
TRACEBACK = "Traceback (most recent call last):"


class Output:
    """Writes from any thread; each call is written whole.

    Only `text` waits for a reader who pauses: what was asked for is never left out, and a rank that has no
    room for more of it waits too. All else goes through `err`, which nobody waits for.

    Every method that writes raises BrokenPipeError when nobody reads any more (of standard error, that is
    known from the next line on). What cannot be written for another reason, such as a full disk, is lost: a
    rank must not have to wait for it.
    """

    def __init__(self, hosts: Sequence[str], out: int = 1, err: Writer | None = None) -> None:
        """`err` None is the standard error of this process."""
        self.out, self.err = out, err or writer.stderr()
        self._hosts = hosts
        self._lock = threading.Lock()
        self._partial: dict[tuple[int, str], bytes] = {}
        self._tails = [deque[str](maxlen=TAIL_LINES) for _ in hosts]
        self._complaints: dict[int, str] = {}
        self._exceptions: dict[int, str] = {}
        self._tracing: set[int] = set()
        self._last: int | None = None
        self._mid_line = False
        self.lost: OSError | None = None
        """Why something of rank 0's standard output could not be written."""
        self.showing = False
        """Whether `text` is at work, which may wait for the reader."""

    def text(self, data: bytes) -> None:
        """Rank 0's standard output."""
        self.showing = True
        try:
            self.lost = writer.write(self.out, data) or self.lost
        finally:
            self.showing = False

    def untagged(self, data: bytes) -> None:
        """Rank 0's standard error."""
        with self._lock:
            self.err.write(data)
            self._mid_line = not data.endswith((b"\n", b"\r"))
            self._last = 0
            for line in self._completed(0, "err", data):
                if line.strip():
                    self._remember(0, _shown(line))

    def tagged(self, rank: int, stream: str, data: bytes) -> None:
        """Any other rank's output; an unfinished line is kept for the next call."""
        with self._lock:
            for line in self._completed(rank, stream, data):
                self._line(rank, line)

    def finish(self, rank: int) -> None:
        """Show the unfinished lines of a rank that has ended; rank 0's have been shown."""
        with self._lock:
            for key in [key for key in self._partial if key[0] == rank]:
                rest = self._partial.pop(key)
                if rank == 0:
                    self._remember(0, _shown(rest))
                else:
                    self._line(rank, rest)

    def say(self, line: str) -> None:
        """A line of the launcher's own."""
        with self._lock:
            self._say(line)

    def _say(self, line: str) -> None:
        start = b"\n" if self._mid_line else b""
        self.err.write(start + line.encode() + b"\n")
        self._mid_line = False

    def complaint(self, rank: int) -> str:
        """The reason that a rank has given for its end; empty if it gave none."""
        return self._complaints.get(rank, "")

    def last_words(self, rank: int) -> str:
        """The reason that a rank has given, else the last exception that it showed; empty without either."""
        return self._complaints.get(rank) or self._exceptions.get(rank, "")

    def _remember(self, rank: int, line: str) -> None:
        self._tails[rank].append(line)
        if line.startswith(COMPLAINT):
            self._complaints[rank] = line.removeprefix(COMPLAINT)
        elif line.startswith(TRACEBACK):
            self._tracing.add(rank)
        elif rank in self._tracing and not line.startswith(" "):
            self._tracing.remove(rank)
            self._exceptions[rank] = line

    def remind(self, rank: int) -> None:
        """Show a rank's last lines again, unless nothing has been written since."""
        with self._lock:
            tail = list(self._tails[rank])
            if rank != 0 and tail and self._last != rank:
                self._say(f"last lines of rank {rank}:")
                for line in tail:
                    self._say(f"{self._tag(rank)} {line}")

    def _completed(self, rank: int, stream: str, data: bytes) -> list[bytes]:
        """The lines that `data` brings to their end; what is left over waits for more."""
        *lines, rest = (self._partial.pop((rank, stream), b"") + data).split(b"\n")
        if rest:
            self._partial[rank, stream] = rest
        return lines

    def _line(self, rank: int, line: bytes) -> None:
        shown = _shown(line)
        self._say(f"{self._tag(rank)} {shown}")
        self._remember(rank, shown)
        self._last = rank

    def _tag(self, rank: int) -> str:
        return f"[rank {rank} {self._hosts[rank]}]"


def _shown(line: bytes) -> str:
    """What a terminal would show of a line: what follows its last carriage return."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
