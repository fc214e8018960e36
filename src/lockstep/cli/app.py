"""The commands, and how a run of one of them ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn

import typer

from lockstep.cli import bench, chat, generate, plan, serve
from lockstep.cli.terminal import LogLines, complain, note
from lockstep.errors import LockstepError, LostPeer
from lockstep.launch import lifeline

app = typer.Typer(
    help="Run one large language model across several machines with MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (generate.generate, chat.chat, serve.serve, plan.plan, bench.bench):
    app.command()(command)


PROGRAM = "LOCKSTEP_PROGRAM"
"""Holds what a person has typed to start us, where that is a script such as ./launch."""


def run() -> NoReturn:
    """Run the command; a LockstepError becomes one line and its exit status."""
    lifeline.watch()
    LogLines.show()
    try:
        app(prog_name=os.environ.pop(PROGRAM, None))
    except LostPeer as error:
        if "LOCKSTEP_BACKEND" not in os.environ:  # our launcher names the culprit itself
            note(str(error))
        _leave(error.exit_status)
    except LockstepError as error:
        complain(str(error))
        _leave(error.exit_status)
    except KeyboardInterrupt:  # Between two commands' own handlers.
        _leave(128 + signal.SIGINT)
    raise AssertionError("typer always exits")


def _leave(status: int) -> NoReturn:
    """End now: waiting for the backend to finalize could mean waiting for a peer that never answers."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, LockstepError):  # There may be no room for it, which has been said.
            stream.flush()
    os._exit(status)
