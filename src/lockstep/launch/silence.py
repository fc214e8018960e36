"""Which processes have stopped making beats (see runtime/beats.py). Pure: it is told the time."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from lockstep.launch.launcher import Running

CONFIRM_S = 2.0
"""From the first look that finds a beat overdue to the last: we may have been stopped ourselves, and then
beats wait to be read."""


class Silence:
    """Finds the processes whose beats stay away."""

    def __init__(self) -> None:
        self._overdue_s: dict[Running, float] = {}
        """When each was first found to be late."""

    def look_s(self, watched: Iterable[Running]) -> float:
        """When to look next."""
        looks = (max(one.beats.due_s, self._overdue_s.get(one, -inf) + CONFIRM_S) for one in watched)
        return min(looks, default=inf)

    def find(self, watched: Iterable[Running], now_s: float) -> Running | None:
        """One that has been late at two looks."""
        late = [one for one in watched if now_s >= one.beats.due_s]
        self._overdue_s = {one: self._overdue_s.get(one, now_s) for one in late}
        return next((one for one in late if now_s - self._overdue_s[one] >= CONFIRM_S), None)
