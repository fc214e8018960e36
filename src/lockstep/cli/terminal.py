"""Writing to the terminal: answers to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.status import Status

from lockstep.errors import complaint

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """Text for stdout, shown at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(line: str) -> None:
    """One line for stderr."""
    stderr.print(f"lockstep: {line}", markup=False)


def complain(reason: str) -> None:
    """Why this process ends, in one line for stderr."""
    stderr.print(complaint(reason), markup=False)


class LogLines(logging.Handler):
    """Shows what this package logs, as downloads that take minutes."""

    @classmethod
    def show(cls) -> None:
        log = logging.getLogger("lockstep")
        log.addHandler(cls())
        log.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


class Spinner:
    """What is being done, on stderr: a spinner on a terminal, lines elsewhere. `end` clears it."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._status: Status | None = None

    def __enter__(self) -> Spinner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def tell(self, text: str) -> None:
        if not self._shown:
            return
        if not stderr.is_terminal:
            stderr.print(text, markup=False)
        elif self._status is None:
            self._status = stderr.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def end(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
