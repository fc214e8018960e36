"""One line in the log for each HTTP request, with what it cost. Never its text, unless that is asked for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from lockstep.observe.logging import FIELDS, plain

log = logging.getLogger("lockstep.requests")

QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines."""


@dataclass
class RequestRecord:
    """What is known of one request when it has ended. Times in seconds; None is nothing to say."""

    id: str
    method: str
    path: str
    began_s: float = field(default_factory=time.monotonic)
    route: str = "unmatched"
    status: int = 500
    client: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    """Time to first token."""
    tpot_s: float | None = None
    """Time per output token after the first, over all choices together."""
    queue_s: float | None = None
    finish: str | None = None
    error: str | None = None
    prompt: str | None = None
    duration_s: float | None = None

    def fields(self) -> dict[str, Any]:
        """Everything that is known, under the names it has here."""
        hidden = {"began_s", "method", "path", "route", "status"}
        return {k: v for k, v in vars(self).items() if v is not None and k not in hidden}

    def write(self) -> None:
        """Log it; machines' questions only at level debug."""
        self.duration_s = time.monotonic() - self.began_s
        level = logging.DEBUG if self.path in QUIET_PATHS else logging.INFO
        log.log(level, "%s %s %d", self.method, plain(self.path), self.status, extra={FIELDS: self.fields()})
