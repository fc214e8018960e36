"""What this rank is doing, and since when. The main thread tells, the watchdog's thread looks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from lockstep.engine.step import Step
from lockstep.runtime.ledger import Ledger, Mark
from lockstep.runtime.pace import Pace, size_class

STARTING, JOINING, LOADING = "starting", "joining", "loading"
AGREEING, TESTING = "agreeing on who computes what", "testing itself"
COMPUTING, IDLE, OUTSIDE = "computing", "waiting for work", "waiting for somebody"


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """One rank's progress. `started` and `done` are the last step that it began and finished."""

    phase: str = STARTING
    since_s: float = 0.0
    """When the phase began or last moved on, by this rank's own clock."""
    deadline_s: float = 0.0
    started: Mark = Mark()
    done: int = -1


class Progress:
    """Cheap enough to be told of every step: it keeps one immutable snapshot, replaced as a whole."""

    def __init__(self, floor_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pace = Pace(floor_s)
        self._floor_s = floor_s
        self._in_flight: OrderedDict[int, int] = OrderedDict()
        self._idle_deadline_s = 0.0
        self.ledger = Ledger()
        self.now = Snapshot(STARTING, clock())

    def enter(self, phase: str, deadline_s: float) -> None:
        """Something other than steps begins, and must be over (or moving on) within `deadline_s`."""
        self._move(phase, deadline_s, self.now.done)

    def began(self, step: Step) -> None:
        """This step is about to be executed."""
        self.ledger.record(step)
        size = self._in_flight[step.index] = size_class(step)
        # A step that waits behind others moves nothing: the clock of the oldest one goes on.
        since_s = self.now.since_s if len(self._in_flight) > 1 else self._clock()
        deadline_s = self._pace.deadline_s(size)
        if len(self._in_flight) > 1:
            deadline_s = max(deadline_s, self.now.deadline_s)
        self.now = Snapshot(COMPUTING, since_s, deadline_s, self.ledger.mark, self.now.done)

    def finished(self, step: Step) -> None:
        """The device has finished this step."""
        self._pace.took(self._in_flight.pop(step.index), self._clock() - self.now.since_s)
        if not self._in_flight:
            self._move(IDLE, self._idle_deadline_s, step.index)
        else:
            self._move(COMPUTING, max(map(self._pace.deadline_s, self._in_flight.values())), step.index)

    def idle(self) -> None:
        """There is nothing to do at the moment."""
        self._move(IDLE, self._idle_deadline_s, self.now.done)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Wait for somebody who may take as long as he likes: a person, or a pipe that is not read."""
        before = self.now
        self._move(OUTSIDE, 0.0, before.done)
        yield
        self._move(before.phase, before.deadline_s, before.done)

    def never_rests(self) -> None:
        """From now on `idle` is told again and again, to show that this rank has not stopped."""
        self._idle_deadline_s = self._floor_s
        self.idle()

    def _move(self, phase: str, deadline_s: float, done: int) -> None:
        self.now = Snapshot(phase, self._clock(), deadline_s, self.ledger.mark, done)
