"""What the supervisor does about a host that is gone; `ssh` is a script that runs the command here."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import msgspec
import pytest

from cluster import Cluster, tiny_checkpoint
from lockstep.errors import LockstepError, UsageError
from lockstep.launch import backends, fronts, launcher, silence, writer
from lockstep.launch.blame import Outcome
from lockstep.launch.fronts import PROGRAM
from lockstep.launch.hostfile import Host
from lockstep.launch.job import Job
from lockstep.launch.streams import Beats
from lockstep.launch.supervisor import Policy, Supervisor
from lockstep.server.notice import SPARE, Notice

PROMPT = "the quick brown"
SSH = """#!/bin/sh
if [ -e {gone} ]; then echo "connect to host beyond port 22: No route to host" >&2; exit 255; fi
for last; do :; done
exec sh -c "$last"
"""


def test_a_host_that_stays_out_of_reach_is_left_out_and_the_streams_go_on(tmp_path):
    model, gone, ssh = tiny_checkpoint(tmp_path), tmp_path / "gone", tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(gone=gone))
    ssh.chmod(0o755)
    hostfile = tmp_path / "hosts.json"
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.1"]}, {"ssh": "beyond", "ips": ["127.0.0.2"]}]
    hostfile.write_text(json.dumps(hosts))
    path = os.pathsep.join([str(ssh.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    arguments = ("--hostfile", str(hostfile), "--model", str(model), "--restarts", "3")
    with Cluster(tmp_path, *arguments, env={"PATH": path}) as cluster:
        cluster.wait_ready()
        undisturbed = cluster.stream(PROMPT)
        undisturbed.join(60)
        stream = cluster.stream(PROMPT)
        while len(stream.arrived_s) < 10:
            assert not stream.error
            time.sleep(0.01)
        gone.touch()
        os.kill(cluster.pid(1), signal.SIGKILL)
        stream.join(90)
        assert (stream.error, stream.text) == ("", undisturbed.text)
        status = cluster.status()
        assert len(status["ranks"]) == 1
        assert "going on without beyond, with 1 ranks" in status["reason"]
        assert "cannot reach beyond" in cluster.output


class Started:
    """A run of `job` that ends with `outcome`; a front process (None) does when it is told that all ends.

    An exception in place of an outcome is a bug that keeps it from being known.
    """

    def __init__(self, job: Job, outcome: Outcome | Exception | None, frozen: bool = False) -> None:
        backends.commands(job)  # Raises what the launcher would.
        self.job, self.told, self._outcome, self._over = job, [], outcome, threading.Event()
        self.beats = Beats(self.told.append, job.first_beat_s if frozen else inf)
        self.handlers = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]

    def wait(self) -> Outcome:
        if self._outcome is None:
            self._over.wait(20)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome or Outcome(0)

    def feed(self, data: bytes) -> None:
        self.told.append(data)
        if msgspec.json.decode(data, type=Notice).ending:
            self._over.set()

    def end(self) -> None:
        self._over.set()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def explain(self, outcome: Outcome) -> None:
        pass


NO_ROOM = "cannot start python: Resource temporarily unavailable"


def never(job: Job, started: int) -> bool:
    return False


@pytest.fixture
def supervise(monkeypatch) -> Iterator:
    """Supervise ranks that end with `outcomes`, one after the other: the status, the front and the ranks."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    def run(
        job: Job,
        *outcomes: Outcome | Exception | None,
        policy: Policy | None = None,
        fails: Callable[[Job, int], bool] = never,
        frozen: str = "",
    ) -> tuple[int, Started, list[Started]]:
        left, started = list(outcomes), []

        def start(job: Job) -> Started:
            if fails(job, len(started)):
                raise LockstepError(NO_ROOM)
            front = job.argv[: len(PROGRAM)] == PROGRAM
            kind = "front" if front else "rank"
            started.append(Started(job, None if front else left[0], kind == frozen))
            if not front:
                left.pop(0)
            return started[-1]

        monkeypatch.setattr(launcher, "start", start)
        status = Supervisor(job, {}, policy or Policy(spare_front=False)).run()
        return status, started[0], started[1:]

    yield run
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


GONE = Outcome(255, 2, "mac2", "cannot reach mac2", gone=True)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_the_hosts_that_are_left_keep_the_devices_that_reach_each_other(supervise, backend):
    macs = tuple(
        Host(f"mac{i}", (f"10.0.0.{i}",), tuple(None if i == j else f"to{j}" for j in range(4)))
        for i in range(4)
    )
    status, _, ranks = supervise(
        Job(("-c", ""), macs, backend), GONE, GONE, Outcome(UsageError.exit_status, reason="the end")
    )
    assert status == UsageError.exit_status
    assert [len(started.job.hosts) for started in ranks] == [4, 4, 3]
    rdma = [(None, "to1", "to3"), ("to0", None, "to3"), ("to0", "to1", None)]
    assert [host.rdma for host in ranks[-1].job.hosts] == rdma


@pytest.mark.timeout(30)
def test_clients_are_told_when_the_ranks_cannot_be_started_again(supervise, capfd):
    macs = tuple(
        Host(f"mac{i}", (f"10.0.0.{i}",), tuple(f"to{j}" if (i - j) % 2 else None for j in range(4)))
        for i in range(4)
    )
    status, front, ranks = supervise(Job(("-c", ""), macs, "jaccl-ring"), GONE, GONE, GONE)
    assert (status, len(ranks)) == (UsageError.exit_status, 2)
    reason = 'jaccl-ring needs an RDMA device from mac1 to mac3: its "rdma" is null at position 2'
    assert front.told[-1] == Notice(reason, ending=True).encode()
    assert capfd.readouterr().err.splitlines()[-2:] == [f"lockstep: error: {reason}", "lockstep: giving up"]


@pytest.mark.timeout(30)
def test_ranks_that_cannot_be_started_again_are_tried_as_often_as_some_that_end(supervise, capfd):
    tries = []

    def fails(job: Job, started: int) -> bool:
        again = started == 2
        if again:
            tries.append(started)
        return again and len(tries) < 3

    crash = Outcome(134, 0, "here", "rank 0 crashed")
    job = Job(("-c", ""), (Host("here"),))
    status, front, ranks = supervise(job, crash, crash, policy=Policy(3, spare_front=False), fails=fails)
    assert (status, len(ranks), len(tries)) == (134, 2, 3)
    assert front.told[-1] == Notice("rank 0 crashed", ending=True).encode()
    assert capfd.readouterr().err.splitlines() == [
        "lockstep: starting the ranks again (restart 1)",
        f"lockstep: error: {NO_ROOM}",
        "lockstep: starting the ranks again in 1 s (restart 2)",
        f"lockstep: error: {NO_ROOM}",
        "lockstep: starting the ranks again in 2 s (restart 3)",
        "lockstep: giving up",
    ]


@pytest.mark.timeout(30)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(supervise):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, front, _ = supervise(Job(("-c", ""), (Host("localhost"),)), Outcome(UsageError.exit_status))
    hangup, terminate = front.handlers
    assert hangup == signal.SIG_IGN and terminate not in (signal.SIG_IGN, signal.SIG_DFL)


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_ranks_whose_end_cannot_be_told_are_started_again(supervise):
    job = Job(("-c", ""), (Host("localhost", ("127.0.0.1",)),))
    status, _, ranks = supervise(job, RuntimeError("a bug"), Outcome(UsageError.exit_status))
    for thread in threading.enumerate():
        if "(_await)" in thread.name:
            thread.join(5)  # Or the next test would be told of the bug.
    assert (status, len(ranks)) == (UsageError.exit_status, 2)


@pytest.fixture
def paused() -> Iterator[int]:
    """Standard error whose reader pauses; the end of the pipe to read."""
    end, begin = os.pipe()
    os.set_blocking(begin, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(begin, b"x" * 512)
    os.set_blocking(begin, True)
    before = os.dup(2)
    os.dup2(begin, 2)
    os.close(begin)
    yield end
    threading.Thread(target=lambda: any(iter(lambda: not os.read(end, 65536), True)), daemon=True).start()
    writer.stderr().flush()
    os.dup2(before, 2)
    os.close(before)


@pytest.mark.timeout(60)
def test_ranks_are_started_again_although_nobody_reads_what_is_said_of_it(supervise, paused):
    job = Job(("-c", ""), (Host("localhost", ("127.0.0.1",)),))
    status, _, ranks = supervise(job, Outcome(1), Outcome(UsageError.exit_status))
    assert (status, len(ranks)) == (UsageError.exit_status, 2)


@pytest.fixture
def impatient(monkeypatch) -> Callable[[int], Policy]:
    """The policy of so many restarts with which silence is noticed within a second."""
    monkeypatch.setattr(silence, "CONFIRM_S", 0.2)
    return lambda restarts: Policy(restarts=restarts, spare_front=False, begin_s=0.3)


@pytest.mark.timeout(30)
def test_a_front_process_that_shows_no_life_is_ended_and_started_again_until_that_is_too_often(
    supervise, impatient, capfd
):
    job, policy = Job(("-c", ""), (Host("here"),)), impatient(1)
    status, first, (ranks, second) = supervise(job, None, policy=policy, frozen="front")
    assert status == 1
    assert second.job.argv == PROGRAM and first.over and second.over
    assert ranks.over
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "lockstep: the front process ended (it had not answered for 1 s): starting it again",
        "lockstep: the front process ended too often",
    ]


@pytest.mark.timeout(30)
def test_a_spare_front_process_that_cannot_be_started_ends_nothing_and_is_tried_again(
    supervise, monkeypatch, capfd
):
    monkeypatch.setattr(fronts, "SPARE_AFTER_S", 0.0)
    monkeypatch.setattr(fronts, "SPARE_AGAIN_S", 0.2)
    tries = []

    def fails(job: Job, started: int) -> bool:
        spare = job.argv[-1] == SPARE
        if spare:
            tries.append(started)
        if len(tries) == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return spare

    job = Job(("-c", ""), (Host("here"),))
    status, front, (ranks,) = supervise(job, None, policy=Policy(), fails=fails)
    assert (status, len(tries)) == (0, 3)
    assert front.told == [Notice(drain=True).encode()] and not ranks.told
    said = capfd.readouterr().err.splitlines()
    assert said == 3 * [f"lockstep: no spare front process: {NO_ROOM}; trying again in 60 s"]


@pytest.mark.timeout(30)
def test_a_front_process_that_cannot_be_started_again_is_tried_as_often_as_one_that_ends(
    supervise, impatient, capfd
):
    job, policy = Job(("-c", ""), (Host("here"),)), impatient(2)
    status, front, (ranks,) = supervise(
        job, None, policy=policy, fails=lambda job, started: started == 2, frozen="front"
    )
    assert status == 1 and front.over and ranks.over
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "lockstep: the front process ended (it had not answered for 1 s): starting it again",
        f"lockstep: the front process ended ({NO_ROOM}): starting it again in 1 s",
        "lockstep: the front process ended too often",
    ]


@pytest.mark.timeout(30)
def test_a_rank_without_others_that_shows_no_life_is_ended_named_and_started_again(
    supervise, impatient, capfd
):
    job, policy = Job(("-c", ""), (Host("here"),)), impatient(1)
    status, front, ranks = supervise(job, None, None, policy=policy, frozen="rank")
    assert status == 1 and len(ranks) == 2 and all(started.over for started in ranks)
    reason = "rank 0 (host here) has not answered for 1 s"
    notices = [Notice(reason), Notice(reason), Notice(reason, ending=True)]
    assert front.told == [notice.encode() for notice in notices]
    assert "lockstep: starting the ranks again (restart 1)" in capfd.readouterr().err


def test_of_several_ranks_none_is_asked_for_beats(supervise):
    hosts = tuple(Host(f"here{rank}", (f"127.0.0.{rank + 1}",)) for rank in range(2))
    _, _, (ranks,) = supervise(Job(("-c", ""), hosts), Outcome(UsageError.exit_status))
    assert ranks.job.first_beat_s == inf
