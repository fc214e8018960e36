"""How long requests wait, as the front process is told."""

from __future__ import annotations

import time

from lockstep.engine.request import Finished, Rejected, Request, Token
from lockstep.runtime.serve import QueueTimes


def test_the_time_in_the_queue_is_reported_with_the_last_event_only() -> None:
    waiting = {"a", "b"}
    times = QueueTimes(waiting.__contains__)
    times.note([Request(id="a", prompt=[1], max_tokens=1), Request(id="b", prompt=[1], max_tokens=1)])
    time.sleep(0.02)
    waiting.remove("a")
    times.note([])
    assert times.add(Token("a", 5)) == Token("a", 5)
    finished = times.add(Finished("a", "length", 1, 1, 0))
    assert isinstance(finished, Finished)
    assert 0.02 <= finished.queue_s < 5
    assert times.add(Rejected("b", "no", False)) == Rejected("b", "no", False)
    again = times.add(Finished("a", "length", 1, 1, 0))
    assert again.queue_s == 0, "nothing is remembered of a request that has ended"
