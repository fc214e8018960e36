"""How long a step may take before something must be wrong: judged by the steps before it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from lockstep.engine.step import Prefill, Step

KEPT = 200
ENOUGH = 5
"""How many measurements make a deadline; it is made anew after as many more."""
TIMES = 20.0
UNKNOWN_TIMES = 6.0
"""A step of a size that has not been seen yet gets this many times the shortest deadline."""


def size_class(step: Step) -> int:
    """Steps of one class take about equally long: by powers of two of their tokens, prefill apart."""
    if step.forward is None:
        return 0
    if isinstance(step.forward, Prefill):
        return -sum(len(row) for row in step.forward.tokens).bit_length()
    return step.forward.rows.bit_length()


class Pace:
    """Measured durations by size class. `floor_s` is the shortest deadline that is ever given."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._took_s: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._counts: Counter[int] = Counter()
        self._deadline_s: dict[int, float] = {}

    def took(self, size: int, seconds: float) -> None:
        """A step of this class has taken so long."""
        took = self._took_s[size]
        took.append(seconds)
        self._counts[size] += 1
        if self._counts[size] % ENOUGH == 0:
            self._deadline_s[size] = max(self._floor_s, TIMES * sorted(took)[int(0.99 * (len(took) - 1))])

    def deadline_s(self, size: int) -> float:
        """How long a step of this class may take: 20 times the 99th percentile, or the floor."""
        return self._deadline_s.get(size, UNKNOWN_TIMES * self._floor_s)
