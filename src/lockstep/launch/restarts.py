"""When to start again after a failure, and when to give up. Pure: it is told the time."""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW_S = 600.0
SHORT_LIFE_S = 8.0
"""Who ends sooner than that after a start will probably do so again: wait before the next start."""

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0

UNREACHABLE_TIMES = 2
"""How often in a row a host may be out of reach before it is left out."""


@dataclass
class Restarts:
    """At most `limit` restarts within `window_s`."""

    limit: int
    window_s: float = WINDOW_S
    _starts_s: list[float] = field(default_factory=list)
    _short_lives: int = 0

    def wait_s(self, now_s: float, lived_s: float) -> float | None:
        """How long to wait before the next start, after a life of `lived_s`; None means to give up."""
        self._starts_s = [start for start in self._starts_s if now_s - start < self.window_s]
        if len(self._starts_s) >= self.limit:
            return None
        self._starts_s.append(now_s)
        self._short_lives = self._short_lives + 1 if lived_s < SHORT_LIFE_S else 0
        if self._short_lives < 2:
            return 0.0
        return float(min(FIRST_WAIT_S * 2 ** (self._short_lives - 2), LONGEST_WAIT_S))


@dataclass
class Reach:
    """Counts how often in a row each host could not be reached."""

    times: int = UNREACHABLE_TIMES
    _missed: dict[str, int] = field(default_factory=dict)

    def lost(self, host: str | None) -> bool:
        """A start has ended because of `host` (None: not because of a host); whether to leave it out now."""
        self._missed = {} if host is None else {host: self._missed.get(host, 0) + 1}
        return host is not None and self._missed[host] >= self.times
