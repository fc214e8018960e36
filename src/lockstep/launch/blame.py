"""Which rank is to blame for the end of a run, and why: from the ranks' statuses and their own words.

The rank that failed first need not be the cause: the end of one makes its neighbours fail within moments,
and the news of it may take longer than theirs.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

from lockstep.errors import LockstepError, LostPeer, UsageError
from lockstep.launch.agent import CANNOT_START
from lockstep.launch.job import Job
from lockstep.launch.output import Output
from lockstep.launch.process import Ended

EXPLAINED = (LockstepError.exit_status, UsageError.exit_status, CANNOT_START)
"""A Python program that ends with one of these has said why, or the agent has in its place."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `rank` and `host` name the culprit, None when there is none; `reason` is one line."""

    status: int
    rank: int | None = None
    host: str | None = None
    reason: str = ""
    told: bool = False
    """Whether the reason has been shown already."""
    gone: bool = False
    """Whether the culprit's host is out of reach."""


class Cause(IntEnum):
    """Whether a failure is what ended the run."""

    SURE = 0
    PERHAPS = 1
    CONSEQUENCE = 2
    """Of another rank's end, surely."""


def cause(failure: Ended, job: Job) -> Cause:
    """How likely this failure is the cause of the others, by its status alone."""
    by_mpirun = job.backend == "mpi" and failure.status == 128 + signal.SIGTERM
    victim = failure.status in (LostPeer.exit_status, 128 + signal.SIGALRM)
    if victim or failure.rank is None or by_mpirun:
        return Cause.CONSEQUENCE
    return Cause.SURE if failure.status > 128 else Cause.PERHAPS


def blame(failures: Sequence[Ended], job: Job, output: Output, ended_well: Collection[int | None]) -> Outcome:
    """The outcome of a run with these failures, in the order of their arrival; at least one.

    `output` knows what the ranks have said; `ended_well` are the ranks that ended with status 0 before.
    """
    culprit = min(failures, key=lambda failure: (cause(failure, job), failure.rank is None))
    victims_only = cause(culprit, job) is Cause.CONSEQUENCE
    if victims_only and (blamed := _blame_another(failures, job, output, ended_well)):
        return blamed
    if culprit.rank is None:
        reason = f"mpirun exited with status {culprit.status}: {culprit.reason or 'it gave no reason'}"
        return Outcome(culprit.status, reason=reason)
    host = job.hosts[culprit.rank].ssh
    if culprit.rank == 0 and culprit.status in EXPLAINED and not culprit.reason:
        # Rank 0 gives its reason itself, untagged. If it is heard and gave none, its status must do.
        own_words = output.complaint(0)
        if own_words or not job.heard:
            return Outcome(culprit.status, 0, host, own_words, told=True)
    reason = culprit.reason or _why(culprit.rank, host, culprit.status, failures, output)
    return Outcome(culprit.status, culprit.rank, host, reason, gone=culprit.gone)


def _why(rank: int, host: str, status: int, failures: Sequence[Ended], output: Output) -> str:
    """What became of a rank: in its own words, or else in those of a rank that waited for it."""
    became = f"rank {rank} (host {host}) {_ending(status)}"
    if status not in EXPLAINED:
        return became
    if words := output.last_words(rank):
        return f"{became}: {words}"
    others = [output.complaint(failure.rank) for failure in failures if failure.rank is not None]
    return next((said for said in others if said.startswith(f"rank {rank} ")), became)


def _blame_another(
    failures: Sequence[Ended], job: Job, output: Output, ended_well: Collection[int | None]
) -> Outcome | None:
    """Who is to blame when every rank that failed did so because of another one."""
    for rank in (failure.rank for failure in failures if failure.rank is not None):
        if said := output.complaint(rank):
            return Outcome(LostPeer.exit_status, reason=said, told=rank == 0)
    failed = {failure.rank for failure in failures}
    for rank, host in enumerate(host.ssh for host in job.hosts):
        if rank in ended_well:
            return Outcome(1, rank, host, f"rank {rank} (host {host}) ended before the others")
    silent = [rank for rank in range(len(job.hosts)) if rank not in failed]
    if len(silent) != 1:
        return None
    rank, host = silent[0], job.hosts[silent[0]].ssh
    joining = all(failure.status == 128 + signal.SIGALRM for failure in failures)
    how = "did not come to join the others" if joining else "stopped answering the others"
    return Outcome(LostPeer.exit_status, rank, host, f"rank {rank} (host {host}) {how}")


def _ending(status: int) -> str:
    if status > 128 and status - 128 in {int(number) for number in signal.valid_signals()}:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(status - 128).name}"
    if status == LostPeer.exit_status:
        return "lost another rank"
    return f"exited with status {status}"
