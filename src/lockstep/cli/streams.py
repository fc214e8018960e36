"""The process's standard streams, made such that whoever uses them need not think of what may be wrong.

Imported before everything else, so it imports next to nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from lockstep.errors import LockstepError


def prepare() -> None:
    """Put /dev/null where a standard stream is closed, and our own streams into `sys`.

    The number of a closed one would else go to the next file or pipe that is opened, which would then be
    read from and written to by whoever means the standard stream.
    """
    for descriptor, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # Takes the lowest free number, which is this one.
            os.set_inheritable(descriptor, True)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = StandardOutput(
        _binary(1), _encoding(sys.stdout), errors="replace", line_buffering=os.isatty(1)
    )
    sys.stderr = StandardError(
        _binary(2), _encoding(sys.stderr), errors="backslashreplace", line_buffering=True
    )


class StandardOutput(io.TextIOWrapper):
    """Characters that its encoding lacks become question marks.

    Raises LockstepError when there is no room for the text, BrokenPipeError when nobody reads it any more.
    """

    def write(self, text: str) -> int:
        with _explained():
            return super().write(text)

    def flush(self) -> None:
        with _explained():
            super().flush()


class StandardError(io.TextIOWrapper):
    """What cannot be written is lost, as there is nowhere to tell it. Raises BrokenPipeError alone."""

    def write(self, text: str) -> int:
        with _forgotten():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with _forgotten():
            super().flush()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LockstepError(f"cannot write to standard output: {error.strerror}") from error


@contextlib.contextmanager
def _forgotten() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        return  # A full disk, or a terminal that has gone.


def _binary(descriptor: int) -> io.BufferedWriter:
    return io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))


def _encoding(stream: TextIO | None) -> str:
    return stream.encoding if stream is not None else "utf-8"
