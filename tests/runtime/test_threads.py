from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from lockstep.runtime.threads import POLLING_NICENESS, ring_in_order, take_turns

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux only")

Start = Callable[[], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a thread that waits for the end of the test, and returns its number."""
    end, threads = threading.Event(), []

    def start() -> int:
        threads.append(threading.Thread(target=end.wait, args=(10,)))
        threads[-1].start()
        return threads[-1].native_id or 0

    yield start
    end.set()
    for thread in threads:
        thread.join(10)


def niceness(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def test_threads_that_hand_out_give_way_to_those_that_poll_and_these_to_all_others(start: Start) -> None:
    before, own = start(), niceness(0)
    with ring_in_order(ranks=1):
        handing_out, polling = [start(), start()], [start(), start()]
    after = start()
    assert {os.sched_getscheduler(thread) for thread in handing_out} == {os.SCHED_IDLE}
    assert {os.sched_getscheduler(thread) for thread in (0, before, after, *polling)} == {os.SCHED_OTHER}
    assert {niceness(thread) - own for thread in polling} == {POLLING_NICENESS}
    assert {niceness(thread) - own for thread in (0, before, after)} == {0}


def test_ranks_that_share_cores_are_left_alone(start: Start) -> None:
    with ring_in_order(ranks=(os.cpu_count() or 1) + 1):
        thread = start()
    assert os.sched_getscheduler(thread) == os.SCHED_OTHER
    assert niceness(thread) == niceness(0)


@pytest.mark.parametrize("policy", ["SCHED_OTHER", "SCHED_IDLE"])
def test_a_thread_and_those_that_it_starts_take_turns_unless_it_was_set_otherwise(policy: str) -> None:
    given, policies = getattr(os, policy), []

    def note() -> None:
        policies.append(os.sched_getscheduler(0))

    def run() -> None:
        os.sched_setscheduler(0, given, os.sched_param(0))
        take_turns()
        note()
        started = threading.Thread(target=note)
        started.start()
        started.join(10)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert policies == 2 * [os.SCHED_BATCH if given == os.SCHED_OTHER else given]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
