"""Who holds up the run? Pure: from what each rank last said of its progress, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from lockstep.runtime.progress import COMPUTING, IDLE, STARTING, Snapshot

IDLE_INTERVAL_S = 5.0
"""How often a rank with nothing to do reports."""

QUIET_S = 3.0
"""A rank that has not reported for so long, while others have, does not answer."""

LOADING_SILENCE_S = 30.0
"""While loading, a long import or allocation may keep the watchdog's thread from running."""


class Report(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What one rank says of itself. `snapshot.since_s` is an age here: seconds ago."""

    rank: int
    host: str
    duty: str
    """What it computes: "layers 10-19"."""
    snapshot: Snapshot
    active_bytes: int = 0
    peak_bytes: int = 0
    """Memory of mlx arrays, now and at most."""


class End(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Rank 0 gives the run up."""

    reason: str
    show_steps: bool = False
    """Whether each rank shall show its last steps: their ledgers differ."""


@dataclass(frozen=True)
class Seen:
    """A report and when it came, by the clock of the rank that got it."""

    report: Report
    heard_s: float

    @property
    def name(self) -> str:
        return f"rank {self.report.rank} (host {self.report.host})"


def silence_limit_s(snapshot: Snapshot, floor_s: float) -> float:
    """How long a rank may say nothing after it has reported `snapshot`."""
    if snapshot.phase == COMPUTING:
        return floor_s
    return floor_s + IDLE_INTERVAL_S if snapshot.phase == IDLE else max(floor_s, LOADING_SILENCE_S)


def patience_s(snapshot: Snapshot, floor_s: float) -> float:
    """How long the only rank may say nothing: a first import or a step may keep its watchdog from running."""
    deadline_s = snapshot.deadline_s if snapshot.phase in (STARTING, COMPUTING) else 0.0
    return max(deadline_s, silence_limit_s(snapshot, floor_s))


def silent(now_s: float, me: Seen, others: Sequence[Seen], floor_s: float) -> str | None:
    """Why to end, if one of `others` has said nothing for too long."""
    for seen in others:
        if now_s - seen.heard_s > silence_limit_s(seen.report.snapshot, floor_s):
            return _charge(seen, (me, *others), "stopped answering", me.report.snapshot)
    return None


def stalled(now_s: float, me: Seen, others: Sequence[Seen]) -> str | None:
    """Why to end, if rank 0 (`me`) has not moved on within its deadline. Names who holds it up.

    That is a rank that does not answer, or else the one that is furthest behind; of several ranks in the same
    place, the first stage among them, because the others need what it sends.
    """
    mine = me.report.snapshot
    stuck_s = now_s - mine.since_s
    if not mine.deadline_s or stuck_s <= mine.deadline_s:
        return None
    if mine.phase in (IDLE, STARTING):  # There it waits for no other rank.
        return f"{me.name} has been stuck for {stuck_s:.0f} s while {mine.phase}"
    if mine.phase != COMPUTING:
        quiet = [seen.name for seen in others if now_s - seen.heard_s > QUIET_S]
        name = ", ".join(quiet) or "a rank"
        return f"{name} got stuck: rank 0 has been {mine.phase} for {stuck_s:.0f} s"

    def blame(seen: Seen) -> tuple[bool, int, int, int]:
        snapshot = seen.report.snapshot
        quiet = seen is not me and now_s - seen.heard_s > QUIET_S
        return quiet, -snapshot.started.index, -snapshot.done, seen.report.rank

    culprit = max((me, *others), key=blame)
    how = "stopped answering" if blame(culprit)[0] else f"has been stuck for {stuck_s:.0f} s"
    return _charge(culprit, (me, *others), how, mine)


def _charge(culprit: Seen, ranks: Sequence[Seen], how: str, mine: Snapshot) -> str:
    theirs = culprit.report.snapshot
    if COMPUTING not in (mine.phase, theirs.phase):
        return f"{culprit.name} {how} while {theirs.phase}"
    step = 1 + (mine.done if mine.phase == COMPUTING else theirs.done)
    blamed = f"{culprit.name} {how} in step {step} while computing {culprit.report.duty}"
    others = [str(seen.report.rank) for seen in ranks if seen is not culprit]
    if not others:
        return blamed
    *names, last = others
    waiting = f"ranks {', '.join(names)} and {last} were" if names else f"rank {last} was"
    return f"{blamed}; {waiting} waiting for it"
