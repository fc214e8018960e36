"""What the watchdog is told of a rank's steps: since when it waits, and for how long it may."""

from __future__ import annotations

from lockstep.engine.step import Decode, Step
from lockstep.runtime.progress import COMPUTING, IDLE, LOADING, OUTSIDE, Progress

FLOOR_S = 10.0
QUICK, SLOW, UNKNOWN = 1, 8, 64
"""Rows of steps that take 0.1 s and 2 s, and of one that has not been seen yet."""


class Rank:
    """A rank's progress by a clock that is set."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.progress = Progress(FLOOR_S, clock=lambda: self.now_s)
        self._steps = 0

    def begin(self, rows: int) -> Step:
        step = Step(self._steps, [], Decode(0, [1] * rows))
        self._steps += 1
        self.progress.began(step)
        return step

    def learn(self) -> None:
        """Execute as many steps as make a deadline: of quick ones the floor, of slow ones 20 times 2 s."""
        for rows, seconds in ((QUICK, 0.1), (SLOW, 2.0)):
            for _ in range(5):
                step = self.begin(rows)
                self.now_s += seconds
                self.progress.finished(step)


def test_a_step_that_waits_behind_another_does_not_set_the_clock_back() -> None:
    rank = Rank()
    rank.now_s = 100.0
    oldest = rank.begin(QUICK)
    rank.now_s = 103.0
    next_one = rank.begin(QUICK)
    assert (rank.progress.now.phase, rank.progress.now.since_s) == (COMPUTING, 100.0)
    rank.now_s = 105.0
    rank.progress.finished(oldest)
    assert (rank.progress.now.phase, rank.progress.now.since_s) == (COMPUTING, 105.0)
    rank.now_s = 106.0
    rank.progress.finished(next_one)
    assert (rank.progress.now.phase, rank.progress.now.since_s) == (IDLE, 106.0)


def test_the_deadline_is_the_longest_of_the_steps_in_flight() -> None:
    rank = Rank()
    rank.learn()
    slow = rank.begin(SLOW)
    assert rank.progress.now.deadline_s == 40.0
    quick = rank.begin(QUICK)
    assert rank.progress.now.deadline_s == 40.0
    rank.begin(UNKNOWN)
    assert rank.progress.now.deadline_s == 60.0
    rank.progress.finished(slow)
    assert rank.progress.now.deadline_s == 60.0
    rank.progress.finished(quick)
    assert rank.progress.now.deadline_s == 60.0


def test_the_deadline_of_a_step_ends_with_it() -> None:
    rank = Rank()
    rank.learn()
    rank.progress.enter(LOADING, 1800.0)
    slow = rank.begin(SLOW)
    assert rank.progress.now.deadline_s == 40.0
    rank.begin(QUICK)
    rank.progress.finished(slow)
    assert rank.progress.now.deadline_s == FLOOR_S


def test_waiting_for_somebody_has_no_deadline_and_does_not_count_for_what_was_being_done() -> None:
    rank = Rank()
    rank.progress.began(step := Step(0, [], Decode(0, [1])))
    before = rank.progress.now
    rank.now_s = 5.0
    with rank.progress.outside():
        assert (rank.progress.now.phase, rank.progress.now.deadline_s) == (OUTSIDE, 0.0)
        rank.now_s = 500.0
    after = rank.progress.now
    assert (after.phase, after.deadline_s, after.started) == (COMPUTING, before.deadline_s, before.started)
    assert after.since_s == 500.0
    rank.progress.finished(step)
    assert rank.progress.now.done == 0


def test_a_rank_that_never_rests_has_a_deadline_while_it_is_idle() -> None:
    rank = Rank()
    rank.progress.idle()
    assert rank.progress.now.deadline_s == 0.0
    rank.progress.never_rests()
    step = rank.begin(QUICK)
    rank.progress.finished(step)
    assert (rank.progress.now.phase, rank.progress.now.deadline_s) == (IDLE, FLOOR_S)
