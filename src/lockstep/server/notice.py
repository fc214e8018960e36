"""What the supervisor tells the front process, on its standard input: one line of JSON each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import msgspec

SPARE = "--spare"
"""Argument of a front process that is to wait for its turn."""


class Notice(msgspec.Struct, frozen=True):
    """Why the engine is away. `ending`: it will not come back, so end every request with this reason.

    `drain`: stop taking requests, finish those that are running, and end.
    `begin`: the spare process serves from now on.
    """

    reason: str = ""
    ending: bool = False
    drain: bool = False
    begin: bool = False

    def encode(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"


def wait_for_turn() -> bool:
    """Block until a spare process is told to begin, before any other notice; False if it never will be."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return False
        line += byte
    return msgspec.json.decode(line, type=Notice).begin


def read_notices(tell: Callable[[Notice], object]) -> None:
    """Call `tell`, from another thread, with each notice that comes."""
    threading.Thread(target=_read, args=(tell,), name="notices", daemon=True).start()


def _read(tell: Callable[[Notice], object]) -> None:
    # Not through sys.stdin: the interpreter could not end while a thread holds its lock.
    rest = b""
    while data := os.read(0, 65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            tell(msgspec.json.decode(line, type=Notice))
