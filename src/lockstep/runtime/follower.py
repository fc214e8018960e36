"""Where the ranks other than 0 get their steps: from rank 0, over the control channel."""

from __future__ import annotations

from collections.abc import Iterator

from lockstep.engine.executor import Pending
from lockstep.engine.step import Step, Stop
from lockstep.errors import LostPeer
from lockstep.runtime.channel import Follower

MOST_IN_FLIGHT = 4
"""Steps handed to the device before waiting for the oldest: enough to keep it busy, and bounded."""

LULL_S = 0.02
"""When no step comes for so long, the ones in flight are finished rather than left hanging."""


class FollowedSteps:
    """Steps as rank 0 publishes them. A rank with nothing to do sleeps on its socket."""

    def __init__(self, channel: Follower) -> None:
        self._channel = channel
        self._in_flight = 0

    def __iter__(self) -> Iterator[Step | None]:
        while True:
            if self._in_flight == MOST_IN_FLIGHT or (self._in_flight and not self._channel.waiting(LULL_S)):
                yield None
                continue
            message = self._channel.receive()
            if isinstance(message, Stop):
                if message.reason:
                    raise LostPeer(message.reason)
                return
            assert isinstance(message, Step), f"rank 0 sent {type(message).__name__} where a step was due"
            self._in_flight += 1
            yield message

    def done(self, step: Step, pending: Pending) -> None:
        self._in_flight -= 1
