"""A server whose processes are killed, frozen and told to stop under streaming clients."""

import os
import signal
import time

import psutil
import pytest

from cluster import Cluster

PROMPT = "the quick brown"
STEP_TIMEOUT_S = 3
SLOW_S = 20
"""For everything else that a restart takes, on a busy machine."""


@pytest.fixture(scope="module", params=[("ring", 2), pytest.param(("mpi", 3), marks=pytest.mark.slow)])
def cluster(request, checkpoint, tmp_path_factory):
    backend, ranks = request.param
    arguments = ("-n", str(ranks), "--backend", backend, "--model", str(checkpoint), "--restarts", "50")
    env = {"LOCKSTEP_STEP_TIMEOUT": str(STEP_TIMEOUT_S)}
    with Cluster(tmp_path_factory.mktemp("serve"), *arguments, env=env) as cluster:
        yield cluster.wait_ready()


@pytest.fixture(scope="module")
def undisturbed(cluster):
    stream = cluster.stream(PROMPT)
    stream.join(60)
    assert stream.text and not stream.error
    return stream.text


def broken(cluster, strike):
    """A stream that `strike` hit after its first pieces of text, when it has ended."""
    stream = cluster.stream(PROMPT)
    deadline_s = time.monotonic() + 30
    while len(stream.arrived_s) < 10:
        assert time.monotonic() < deadline_s and not stream.error, stream
        time.sleep(0.01)
    strike()
    stream.join(90)
    return stream


@pytest.mark.parametrize("victim", [0, -1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_stream_goes_on_with_the_same_text_when_a_rank_is_lost(cluster, undisturbed, victim, number):
    before = cluster.status()
    pid = cluster.pid(victim)
    stream = broken(cluster, lambda: os.kill(pid, number))
    assert (stream.error, stream.text) == ("", undisturbed)
    after = cluster.status()
    assert after["restarts"] == before["restarts"] + 1
    rank = before["ranks"][victim]["rank"]
    assert f"rank {rank} (host " in after["reason"], after["reason"]
    assert stream.longest_silence_s < 2 * STEP_TIMEOUT_S + SLOW_S
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=lambda n: n.name
)
def test_a_front_process_that_is_lost_is_replaced_by_its_spare_on_the_same_engine(
    cluster, undisturbed, number
):
    deadline_s = time.monotonic() + 2 * SLOW_S
    while (spare := cluster.spare_front()) is None:
        assert time.monotonic() < deadline_s, cluster.output
        time.sleep(0.2)
    before = [rank["pid"] for rank in cluster.status()["ranks"]]
    # Looked up before the stream begins: the tiny model is done with it in less time than that takes.
    front = cluster.front().pid
    stream = broken(cluster, lambda: os.kill(front, number))
    # One that was stopped is told to end and goes on for a moment in which it may finish the stream.
    assert stream.error or stream.text != undisturbed or number == signal.SIGSTOP
    assert not stream.is_alive()
    deadline_s = time.monotonic() + SLOW_S
    while not cluster.answers():
        assert time.monotonic() < deadline_s, cluster.output
        time.sleep(0.1)
    again = cluster.stream(PROMPT)
    again.join(60)
    assert (again.error, again.text) == ("", undisturbed)
    status = cluster.wait_status(lambda s: s["ranks"] and s["running"] == 0, 15)
    assert [rank["pid"] for rank in status["ranks"]] == before
    assert cluster.front().pid == spare.pid, cluster.output
    assert not psutil.pid_exists(front)


def test_the_first_signal_lets_running_requests_finish_and_leaves_nothing(cluster, undisturbed):
    stream = broken(cluster, lambda: cluster.process.send_signal(signal.SIGTERM))
    assert (stream.error, stream.text) == ("", undisturbed)
    assert cluster.process.wait(30) == 0
    assert cluster.left() == []


@pytest.mark.slow
def test_a_stream_goes_on_when_the_only_rank_is_stopped(checkpoint, tmp_path):
    with Cluster(tmp_path, "--model", str(checkpoint), "--no-spare-front") as cluster:
        cluster.wait_ready()
        undisturbed = cluster.stream(PROMPT, 3000)
        undisturbed.join(60)
        pid = cluster.pid(0)
        stream = cluster.stream(PROMPT, 3000)
        while len(stream.arrived_s) < 10:
            assert not stream.error
            time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
        stream.join(90)
        assert (stream.error, stream.text) == ("", undisturbed.text)
        status = cluster.status()
        assert status["restarts"] == 1
        assert "rank 0 (host localhost) has not answered for" in status["reason"]
        assert not psutil.pid_exists(pid)
