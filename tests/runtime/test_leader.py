"""In which order rank 0 does what others wait for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from lockstep.engine.executor import Pending
from lockstep.engine.grammar import Grammars
from lockstep.engine.limits import Limits
from lockstep.engine.request import (
    Cancel,
    Command,
    Event,
    Finished,
    Forget,
    Rejected,
    Request,
    Sampling,
    Token,
)
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.step import Decode, Step
from lockstep.runtime.leader import LedSteps
from lockstep.runtime.loop import run
from lockstep.runtime.progress import Progress


class Outside:
    """A front process and the other ranks: both see what rank 0 says, in this order, in `heard`.

    `commands` come once as many tokens have been drawn as their number says.
    """

    def __init__(self, commands: dict[int, list[Command]]) -> None:
        self._commands = commands
        self.heard: list[Any] = []
        self.drawn = 0
        self.grammars: Grammars | None = None

    @property
    def closed(self) -> bool:
        return not self._commands

    def poll(self) -> list[Command]:
        return self._commands.pop(self.drawn, [])

    def wait(self) -> None:
        raise AssertionError(f"nothing to do, but {self._commands} have not come")

    def deliver(self, events: Sequence[Event]) -> None:
        self.heard += events

    def publish(self, step: Step) -> None:
        self.heard.append(step)

    def stop(self) -> None:
        self.heard.append("stop")

    def start(self, step: Step) -> Pending:
        """As the executor: every token is 7."""
        wanted: Sequence[mx.array] = []
        if isinstance(step.forward, Decode):
            self.drawn += 1
            wanted = self._steps.finish(step, mx.array([[7]] * step.forward.rows))
        return Pending(wanted, [])

    def serve(self) -> None:
        scheduler = Scheduler(Limits(lanes=1, kv_tokens=1000, max_context=100))
        self._steps: Any = LedSteps(scheduler, self, self, self.grammars)  # type: ignore[arg-type]
        run(self, self._steps, Progress(floor_s=1.0))  # type: ignore[arg-type]


def test_other_ranks_hear_of_the_next_step_before_the_front_hears_of_the_last_token() -> None:
    outside = Outside({0: [Request(id="a", prompt=[1, 2], max_tokens=3)]})
    outside.serve()
    assert outside.heard[-1] == "stop"
    before_token = [
        sum(isinstance(item, Step) and isinstance(item.forward, Decode) for item in outside.heard[:place])
        for place, item in enumerate(outside.heard)
        if isinstance(item, Token)
    ]
    assert before_token == [3, 3, 3], "decodes published before each token is told, of three"


def test_a_request_is_told_its_last_token_before_its_end() -> None:
    outside = Outside({0: [Request(id="a", prompt=[1, 2], max_tokens=50)], 2: [Cancel("a")]})
    outside.serve()
    events = [item for item in outside.heard if isinstance(item, Token | Finished)]
    assert [type(event) for event in events] == [Token, Finished]
    assert isinstance(events[-1], Finished) and events[-1].completion_tokens == 1


def test_a_grammar_that_cannot_be_followed_ends_its_request_and_nothing_else(tmp_path: Path) -> None:
    held = Request(id="b", prompt=[1, 2], max_tokens=2, stop_tokens=[1], sampling=Sampling(grammar="{}"))
    outside = Outside({0: [Request(id="a", prompt=[1, 2], max_tokens=2)], 1: [held]})
    outside.grammars = Grammars(tmp_path, 8)
    outside.serve()
    refused = next(item for item in outside.heard if isinstance(item, Rejected))
    assert (refused.id, refused.retry) == ("b", False)
    assert "cannot be held to a form" in refused.reason
    assert [item.id for item in outside.heard if isinstance(item, Finished)] == ["a"]


def test_what_a_front_missed_is_not_told_to_the_next_one() -> None:
    outside = Outside({0: [Request(id="a", prompt=[1, 2], max_tokens=50)], 3: [Forget()]})
    outside.serve()
    assert [item for item in outside.heard if isinstance(item, Token | Finished)] == [Token("a", 7)]
