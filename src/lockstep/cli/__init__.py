"""The `lockstep` command. Outside a rank it is the launcher; inside one it is the rank."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from lockstep.cli import streams


def main() -> NoReturn:
    """Run the command that the arguments name, and end with its exit status."""
    streams.prepare()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # It is ignored in a shell's background jobs.
        signal.signal(signal.SIGINT, _leave)
    from lockstep.cli import app  # Takes long enough for a Ctrl-C.

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    app.run()


def _leave(number: int, _: FrameType | None) -> NoReturn:
    os._exit(128 + number)
