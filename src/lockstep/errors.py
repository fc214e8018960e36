"""The errors a person may see. Each message says what is wrong, with the numbers, and what to do.

LockstepError                exit status 1: the run failed
├── UsageError               exit status 2: what was asked for cannot be done
│   └── DoesNotFit           the model, in the memory that there is
└── LostPeer                 exit status 75: this rank is well, but another one ended
"""

from __future__ import annotations

COMPLAINT = "lockstep: error: "
"""Begins the line by which a process says why it ends. The launcher knows the reason by it."""


def complaint(reason: str) -> str:
    """That line, without its end."""
    return COMPLAINT + reason


def in_a_line(error: BaseException) -> str:
    """What a library raised, for a message of ours: its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")


class LockstepError(Exception):
    """A failure that is explained in one or two lines, without a traceback."""

    exit_status = 1


class UsageError(LockstepError):
    """The command, a file it names or a request cannot be honoured as it stands."""

    exit_status = 2


class DoesNotFit(UsageError):
    """A rank has too little memory for its part of the model."""


class LostPeer(LockstepError):
    """Another rank ended, so this one does too (EX_TEMPFAIL): the culprit is to be found elsewhere."""

    exit_status = 75
