"""Where the events of one client's requests arrive."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from lockstep.engine.request import Event


@dataclass(frozen=True)
class Failed:
    """The engine was away for too long, or the front is about to end."""

    id: str
    reason: str


class Inbox:
    """The events of one client's requests, in order of arrival."""

    def __init__(self) -> None:
        self._events: deque[Event | Failed] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Event | Failed) -> None:
        self._events.append(event)
        self._arrived.set()

    async def wait(self, timeout_s: float) -> Event | Failed | None:
        """The first event, left where it is; None when none came in time."""
        if not self._events:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        return self._events[0]

    async def take(self, timeout_s: float) -> list[Event | Failed]:
        """All events that are there, waiting for the first; empty when none came in time."""
        if await self.wait(timeout_s) is None:
            return []
        events = list(self._events)
        self._events.clear()
        return events
