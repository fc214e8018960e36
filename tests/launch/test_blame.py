"""Who is to blame for the end of a run, for every way in which ranks end; no process is started."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import LostPeer, complaint
from lockstep.launch.agent import CANNOT_START
from lockstep.launch.blame import Cause, Outcome, blame, cause
from lockstep.launch.hostfile import Host
from lockstep.launch.job import Job
from lockstep.launch.output import TRACEBACK, Output
from lockstep.launch.process import Ended
from lockstep.launch.writer import Writer

HOSTS = tuple(Host(name) for name in "abc")
RING, HEARD, MPI = Job((), HOSTS), Job((), HOSTS, heard=True), Job((), HOSTS, backend="mpi")
LOST, ALARMED = LostPeer.exit_status, 128 + signal.SIGALRM
TERMINATED, KILLED = 128 + signal.SIGTERM, 128 + signal.SIGKILL


@pytest.fixture
def output(nowhere: Writer) -> Output:
    return Output([host.ssh for host in HOSTS], err=nowhere)


def say(output: Output, rank: int, *lines: str) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    output.tagged(rank, "err", data) if rank else output.untagged(data)


@pytest.mark.parametrize(
    ("failure", "job", "expected"),
    [
        (Ended(1, KILLED), RING, Cause.SURE),
        (Ended(1, TERMINATED), RING, Cause.SURE),
        (Ended(1, 1), RING, Cause.PERHAPS),
        (Ended(1, LOST), RING, Cause.CONSEQUENCE),
        (Ended(1, ALARMED), RING, Cause.CONSEQUENCE),
        (Ended(1, TERMINATED), MPI, Cause.CONSEQUENCE),
        (Ended(None, 1), MPI, Cause.CONSEQUENCE),
    ],
)
def test_a_status_tells_whether_a_failure_may_be_the_cause(failure: Ended, job: Job, expected: Cause) -> None:
    assert cause(failure, job) is expected


FAILURES = st.builds(
    Ended, st.integers(0, 2), st.sampled_from([1, 2, 3, LOST, ALARMED, TERMINATED, KILLED, CANNOT_START])
)


@given(st.lists(FAILURES, min_size=1, max_size=3, unique_by=lambda failure: failure.rank))
def test_the_likeliest_cause_is_blamed_and_of_equals_the_first(
    nowhere: Writer, failures: list[Ended]
) -> None:
    likeliest = min(cause(failure, RING) for failure in failures)
    outcome = blame(failures, RING, Output("abc", err=nowhere), [])
    assert outcome.status != 0
    if likeliest is not Cause.CONSEQUENCE:
        first = next(failure for failure in failures if cause(failure, RING) is likeliest)
        assert (outcome.rank, outcome.status) == (first.rank, first.status)


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (3, ["no matter"], "exited with status 3"),
        (KILLED, [complaint("no matter")], "was killed by SIGKILL"),
        (128 + 120, [], "exited with status 248"),
        (1, [], "exited with status 1"),
        (1, [complaint("no room")], "exited with status 1: no room"),
        (1, [TRACEBACK, "  File", "ValueError: no layer"], "exited with status 1: ValueError: no layer"),
        (2, [TRACEBACK, "KeyError: 1", complaint("no room")], "exited with status 2: no room"),
    ],
)
def test_the_reason_is_the_culprits_own_where_its_status_has_one(
    output: Output, status: int, said: Sequence[str], reason: str
) -> None:
    say(output, 1, *said)
    expected = Outcome(status, 1, "b", f"rank 1 (host b) {reason}")
    assert blame([Ended(0, LOST), Ended(1, status)], RING, output, []) == expected


def test_a_culprit_without_words_is_described_by_a_rank_that_waited_for_it(output: Output) -> None:
    say(output, 2, complaint("rank 1 (b) has been loading for 60 s"))
    failures = [Ended(1, 1), Ended(2, LOST)]
    assert blame(failures, RING, output, []).reason == "rank 1 (b) has been loading for 60 s"
    failures = [Ended(0, 1), Ended(2, LOST)]
    assert blame(failures, HEARD, output, []).reason == "rank 0 (host a) exited with status 1"


def test_what_rank_0_has_said_is_known_and_not_said_again(output: Output) -> None:
    assert blame([Ended(0, 1)], RING, output, []) == Outcome(1, 0, "a", "", told=True)
    silent = Outcome(1, 0, "a", "rank 0 (host a) exited with status 1")
    assert blame([Ended(0, 1)], HEARD, output, []) == silent
    say(output, 0, complaint("no model"))
    assert blame([Ended(0, 1)], HEARD, output, []) == Outcome(1, 0, "a", "no model", told=True)
    assert blame([Ended(0, 3)], HEARD, output, []).reason == "rank 0 (host a) exited with status 3"


def test_what_is_known_of_the_connection_counts_before_the_status(output: Output) -> None:
    lost = Ended(2, 255, "lost the ssh connection to c: is the machine still on?", gone=True)
    assert blame([Ended(0, 1), lost], RING, output, []) == Outcome(255, 2, "c", lost.reason, gone=True)
    refused = Ended(0, CANNOT_START, "cannot start python on a")
    assert blame([refused], RING, output, []) == Outcome(CANNOT_START, 0, "a", refused.reason)


def test_mpirun_is_blamed_only_where_no_rank_is(output: Output) -> None:
    failures = [Ended(None, 213, "There are not enough slots."), Ended(1, TERMINATED)]
    assert blame([*failures, Ended(2, 3)], MPI, output, []).rank == 2
    reason = "mpirun exited with status 213: There are not enough slots."
    assert blame(failures[:1], MPI, output, []) == Outcome(213, reason=reason)
    assert blame([Ended(None, 1)], MPI, output, []).reason == "mpirun exited with status 1: it gave no reason"


@pytest.mark.parametrize("rank", [0, 1])
def test_whom_a_victim_names_is_to_blame(output: Output, rank: int) -> None:
    say(output, rank, complaint("rank 2 (c) stopped answering"))
    outcome = blame([Ended(0, LOST), Ended(1, LOST)], HEARD, output, [2])
    assert outcome == Outcome(LOST, reason="rank 2 (c) stopped answering", told=rank == 0)


def test_a_rank_that_ended_well_before_its_victims_is_to_blame(output: Output) -> None:
    outcome = blame([Ended(0, LOST), Ended(2, LOST)], RING, output, [1])
    assert outcome == Outcome(1, 1, "b", "rank 1 (host b) ended before the others")


@pytest.mark.parametrize(
    ("statuses", "how"),
    [
        ((ALARMED, ALARMED), "did not come to join the others"),
        ((ALARMED, LOST), "stopped answering the others"),
        ((LOST, LOST), "stopped answering the others"),
    ],
)
def test_the_only_rank_of_which_nothing_was_heard_is_to_blame(
    output: Output, statuses: tuple[int, int], how: str
) -> None:
    failures = [Ended(rank, status) for rank, status in enumerate(statuses)]
    assert blame(failures, RING, output, []) == Outcome(LOST, 2, "c", f"rank 2 (host c) {how}")


@pytest.mark.parametrize("ranks", [(1,), (1, 0, 2)])
def test_victims_that_know_no_culprit_are_named_themselves(output: Output, ranks: Sequence[int]) -> None:
    outcome = blame([Ended(rank, LOST) for rank in ranks], RING, output, [])
    assert outcome == Outcome(LOST, 1, "b", "rank 1 (host b) lost another rank")
