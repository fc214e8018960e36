"""What a run says and leaves behind when it cannot go on."""

import signal
import time

import pytest

from cluster import Cluster
from command import lockstep


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("rank=1,step=3,action=exit3", "rank 1 (host localhost) exited with status 3"),
        ("rank=1,step=3,action=exit0", "rank 1 (host localhost) ended before the others"),
        ("rank=1,step=3,action=raise", "LOCKSTEP_FAULT raises in step 3"),
        ("rank=1,step=3,action=freeze", "rank 1 (host "),
        ("rank=0,step=3,action=freeze", "rank 0 (host "),
        pytest.param("rank=0,step=3,action=stop", "rank 0 (host ", marks=pytest.mark.slow),
        ("rank=1,step=3,action=wrong-step", "executed another step"),
        ("rank=1,action=fail-load", "LOCKSTEP_FAULT makes loading fail"),
        ("rank=1,step=3,action=oom", "rank 1 (host localhost) "),
    ],
)
def test_a_rank_that_fails_ends_the_run_and_is_named(fault, said, checkpoint):
    env = {"LOCKSTEP_FAULT": fault, "LOCKSTEP_STEP_TIMEOUT": "0.5"}
    done = lockstep(
        "generate", "-n", "2", "--model", str(checkpoint), "--max-tokens", "2000", "hello", env=env
    )
    assert done.status not in (0, 124)
    assert said in done.stderr
    assert done.left == []


@pytest.mark.parametrize("backend", ["ring", pytest.param("mpi", marks=pytest.mark.slow)])
def test_a_rank_that_stops_after_the_last_token_does_not_keep_the_answer(backend, checkpoint):
    fault = {"LOCKSTEP_FAULT": "rank=1,step=6,action=stop", "LOCKSTEP_STEP_TIMEOUT": "3"}
    arguments = ("-n", "2", "--backend", backend, "--parallel", "tensor", "--model", str(checkpoint))
    result = lockstep("generate", *arguments, "--max-tokens", "5", "--raw", "the quick brown", env=fault)
    assert (result.status, len(result.stdout) > 1) == (0, True), result.stderr
    said = "lockstep: rank 1 (host localhost) did not end within 10 s after rank 0: ended now"
    assert result.stderr.splitlines()[-1] == said
    assert not result.left


def test_a_server_whose_ranks_fail_at_every_start_gives_up_with_the_reason(checkpoint, tmp_path):
    env = {"LOCKSTEP_FAULT": "rank=1,action=exit3,step=0,attempt=all"}
    arguments = ("-n", "2", "--model", str(checkpoint), "--restarts", "1")
    with Cluster(tmp_path, *arguments, env=env) as cluster:
        cluster.wait_ready()
        stream = cluster.stream("the quick brown")
        stream.join(60)
        assert "rank 1 (host localhost) exited with status 3" in stream.error
        assert cluster.process.wait(30) == 3
        assert cluster.left() == []


def test_a_second_signal_ends_at_once_and_more_of_them_change_nothing(checkpoint, tmp_path):
    # The fault keeps the stream from ending, and so the first signal's drain.
    env = {"LOCKSTEP_FAULT": "rank=1,step=20,action=sleep:60", "LOCKSTEP_STEP_TIMEOUT": "60"}
    with Cluster(tmp_path, "-n", "2", "--model", str(checkpoint), env=env) as cluster:
        cluster.wait_ready()
        stream = cluster.stream("the quick brown", max_tokens=3000)
        while not stream.arrived_s:
            time.sleep(0.01)
        cluster.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert cluster.process.poll() is None
        deadline_s = time.monotonic() + 10
        while cluster.process.poll() is None and time.monotonic() < deadline_s:
            cluster.process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        assert cluster.process.poll() == 0
        assert cluster.left() == []
