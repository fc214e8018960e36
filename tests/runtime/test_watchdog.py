"""When a rank's watchdog judges the other ranks, and when it does not."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lockstep.runtime import watchdog
from lockstep.runtime.options import Deadlines


class Judging(watchdog.Watchdog):
    """Notes when it would judge."""

    def __init__(self, until_s: float) -> None:
        self.judged_s: list[float] = []
        self.reached = threading.Event()
        self._until_s = until_s
        super().__init__(0, Deadlines())

    def _judge(self, now_s: float) -> None:
        self.judged_s.append(now_s)
        if now_s >= self._until_s:
            self.reached.set()


def test_a_process_that_was_stopped_itself_hears_the_others_out_before_it_judges_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wakes: Iterator[float] = itertools.chain([0, 1, 2, 20, 21, 22, 23, 24], itertools.repeat(25))
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: next(wakes)))
    monkeypatch.setattr(watchdog, "TICK_S", 0.001)
    judging = Judging(until_s=25)
    assert judging.reached.wait(10)
    judging.stop()
    assert watchdog.QUIET_S == 3.0
    assert judging.judged_s[:4] == [1, 2, 23, 24]
