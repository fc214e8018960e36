"""Where rank 0's requests come from and where their tokens go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lockstep.engine.request import Cancel, Command, Event, Finished, Rejected, Request, Token


class Source(Protocol):
    """Rank 0's only view of the outside world."""

    @property
    def closed(self) -> bool:
        """Whether no command will come any more."""

    def poll(self) -> Sequence[Command]:
        """The commands that have come; does not wait."""

    def wait(self) -> None:
        """Sleep until there may be a command."""

    def deliver(self, events: Sequence[Event]) -> None:
        """Pass on what has become of the requests."""


class SingleRequest:
    """A source with one request. `on_token` says whether to go on."""

    def __init__(self, request: Request, on_token: Callable[[int], bool]) -> None:
        self._commands: list[Command] = [request]
        self._on_token = on_token
        self._stopped = False
        self.outcome: Finished | Rejected | None = None
        self.token_ids: list[int] = []

    @property
    def closed(self) -> bool:
        return self.outcome is not None

    def poll(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def wait(self) -> None:
        raise AssertionError("the engine is idle, but the only request has not ended")

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Finished | Rejected):
                self.outcome = event
            elif isinstance(event, Token) and not self._stopped:
                self.token_ids.append(event.token)
                if not self._on_token(event.token):
                    self._stopped = True
                    self._commands.append(Cancel(event.id))
