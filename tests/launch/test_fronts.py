import time

import pytest

from lockstep.engine.wire import ENVIRONMENT as LINK
from lockstep.errors import LockstepError, UsageError
from lockstep.launch.fronts import PROGRAM, Fronts
from lockstep.launch.hostfile import Host
from lockstep.launch.job import Job
from lockstep.server.notice import Notice


class Started:
    """A process that was started for `job`: what it was told, and whether it was ended."""

    def __init__(self, job: Job) -> None:
        self.job, self.told, self.ended = job, [], False

    def feed(self, data: bytes) -> None:
        self.told.append(data)

    def end(self) -> None:
        self.ended = True


def no_room(job: Job) -> Started:
    raise LockstepError("cannot start python: Resource temporarily unavailable")


@pytest.fixture
def make():
    return lambda keep_spare=True: Fronts(
        Job(argv=("-c", ""), hosts=(Host("localhost"),), backend="ring"), Started, keep_spare
    )


def test_a_spare_process_is_due_after_a_while_and_takes_over(make):
    pair = make()
    first, due_s = pair.serving, pair.spare_due_s
    assert first.job.argv == PROGRAM and first.job.fed and due_s is not None
    pair.add_spare()
    assert pair.spare_due_s is None
    pair.replace()
    assert pair.serving is not first
    assert pair.serving.job.argv == (*PROGRAM, "--spare")
    assert pair.serving.told == [Notice(begin=True).encode()]
    assert pair.spare_due_s is not None and pair.spare_due_s >= due_s


def test_without_a_spare_process_a_new_one_is_started(make):
    pair = make()
    pair.replace()
    assert pair.serving.job.argv == PROGRAM and not pair.serving.told


def test_a_spare_process_that_ends_is_not_waited_for(make):
    pair = make()
    serving = pair.serving
    pair.add_spare()
    spare = pair._spare
    assert not pair.lost(serving)
    assert pair.lost(spare) and spare.ended
    pair.replace()
    assert pair.serving not in (serving, spare)


def test_a_spare_process_that_cannot_be_started_is_due_again(make, monkeypatch):
    pair = make()
    serving = pair.serving
    monkeypatch.setattr(pair, "_start", no_room)
    with pytest.raises(LockstepError):
        pair.add_spare()
    assert pair.spare_due_s > time.monotonic()
    with pytest.raises(LockstepError):
        pair.replace()
    assert pair.serving is serving
    monkeypatch.setattr(pair, "_start", Started)
    pair.add_spare()
    assert pair.spare_due_s is None
    pair.replace()
    assert pair.serving.job.argv == (*PROGRAM, "--spare")


def test_none_is_due_if_none_is_wanted(make):
    assert make(keep_spare=False).spare_due_s is None


def test_both_are_ended(make):
    pair = make()
    pair.add_spare()
    both = pair.serving, pair._spare
    pair.end()
    assert all(process.ended for process in both)


def test_the_reason_that_a_front_process_gives_for_its_end_is_known_and_not_said_twice(launch):
    program = "import sys\nfrom lockstep.server import front\nsys.exit(front.main())\n"
    status, _, err = launch(program, n=1, stdin=False, heard=True).finish(timeout_s=40)
    reason = f"{LINK} is not set: `lockstep serve` starts this process"
    assert (status, err) == (UsageError.exit_status, f"lockstep: error: {reason}\n")
