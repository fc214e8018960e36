"""In which order rank 0 does what others wait for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

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

    def __init__(self, commands: dict[int, list[Command]], look_ahead: bool = True) -> None:
        self._commands = commands
        self._look_ahead = look_ahead
        self.heard: list[Any] = []
        self.drawn = 0
        self.grammars: Grammars | None = None
        self.progress = Progress(floor_s=1.0)

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
        limits = Limits(lanes=1, kv_tokens=1000, max_context=700, look_ahead=self._look_ahead)
        scheduler = Scheduler(limits)
        self._steps: Any = LedSteps(scheduler, self, self, self.grammars)  # type: ignore[arg-type]
        run(self, self._steps, self.progress)  # type: ignore[arg-type]


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


class InFlight(Progress):
    """The steps that were in flight whenever one began, itself the last."""

    def __init__(self) -> None:
        super().__init__(floor_s=1.0)
        self.seen: list[list[Step]] = [[]]

    def began(self, step: Step) -> None:
        super().began(step)
        self.seen.append([*self.seen[-1], step])

    def finished(self, step: Step) -> None:
        super().finished(step)
        self.seen.append([other for other in self.seen[-1] if other != step])


def test_on_a_cpu_only_a_decode_that_goes_ahead_begins_before_the_last_step_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lockstep.runtime.leader.computes_on_cpu", lambda: True)
    later = Request(id="b", prompt=[1] * 600, max_tokens=3)
    outside = Outside({0: [Request(id="a", prompt=[1, 2], max_tokens=9)], 3: [later]})
    outside.progress = flights = InFlight()
    outside.serve()
    begun_early = [steps[-1].forward for steps in flights.seen if len(steps) > 1]
    assert len(begun_early) > 5
    assert all(isinstance(forward, Decode) and forward.ahead for forward in begun_early)
    assert max(map(len, flights.seen)) == 2


@pytest.mark.parametrize(
    ("on_cpu", "look_ahead", "fewest", "most"),
    [(True, False, 1, 1), (True, True, 2, 2), (False, False, 2, 99)],
)
def test_so_many_steps_may_be_in_flight(
    on_cpu: bool, look_ahead: bool, fewest: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.runtime.leader.computes_on_cpu", lambda: on_cpu)
    later = Request(id="b", prompt=[1] * 600, max_tokens=3)
    outside = Outside({0: [Request(id="a", prompt=[1, 2], max_tokens=9)], 3: [later]}, look_ahead)
    outside.progress = flights = InFlight()
    outside.serve()
    assert fewest <= max(map(len, flights.seen)) <= most


def test_a_request_is_told_its_last_token_before_its_end() -> None:
    outside = Outside({0: [Request(id="a", prompt=[1, 2], max_tokens=50)], 3: [Cancel("a")]})
    outside.serve()
    events = [item for item in outside.heard if isinstance(item, Token | Finished)]
    assert [type(event) for event in events] == [Token, Token, Finished]
    assert isinstance(events[-1], Finished) and events[-1].completion_tokens == 2


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
