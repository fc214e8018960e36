"""The control channel, with real sockets on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lockstep.engine.step import Decode, Keep, Prefill, Step, Stop
from lockstep.errors import LockstepError, LostPeer
from lockstep.runtime.channel import Follower, KeyPair, Leader
from lockstep.runtime.messages import Assignment, Failed, Ready


@pytest.fixture
def leader() -> Iterator[Leader]:
    leader = Leader("127.0.0.1", KeyPair.make())
    yield leader
    leader.close()


def follow(leader: Leader, rank: int, keys: KeyPair) -> Follower:
    return Follower(rank, "127.0.0.1", (leader.port, leader.watch_port), leader.keys.public, keys)


def test_steps_arrive_whole_and_in_order_at_every_rank(leader: Leader) -> None:
    keys = [KeyPair.make() for _ in range(2)]
    leader.admit(pair.public for pair in keys)
    followers = [follow(leader, rank, pair) for rank, pair in enumerate(keys, start=1)]
    for rank, follower in enumerate(followers, start=1):
        follower.report(Ready(rank, 10 * rank, 0, 5))
    assert [r.weight_bytes for r in leader.gather(Ready, 3, 5, "load")] == [10, 20]

    said = [
        Assignment("pipeline", [(5, 9), (2, 5), (0, 2)]),
        Step(0, [], Prefill(7, [[1, 2], [3]])),
        Step(1, [Keep(7, [1])], Decode(7, [4])),
        *[Step(i, [], Decode(7, [i])) for i in range(2, 500)],
        Stop(),
    ]
    for message in said:
        leader.publish(message)
    for follower in followers:
        assert [follower.receive(5) for _ in said] == said
        follower.close()


def test_a_rank_without_an_admitted_key_is_not_heard(leader: Leader) -> None:
    leader.admit([KeyPair.make().public])
    stranger = follow(leader, 1, KeyPair.make())
    stranger.report(Ready(1, 0, 0, 0))
    with pytest.raises(LockstepError, match=r"rank 1 did not load in 0.5 s"):
        leader.gather(Ready, 2, 0.5, "load")
    stranger.close()


def test_the_silent_rank_is_named(leader: Leader) -> None:
    keys = KeyPair.make()
    leader.admit([keys.public])
    follower = follow(leader, 1, keys)
    follower.report(Ready(1, 0, 0, 0))
    with pytest.raises(LockstepError, match=r"rank 2 did not load in 0.5 s"):
        leader.gather(Ready, 3, 0.5, "load")
    follower.close()


def test_a_failure_is_passed_on_with_its_reason(leader: Leader) -> None:
    keys = KeyPair.make()
    leader.admit([keys.public])
    follower = follow(leader, 1, keys)
    follower.report(Failed(1, "disk on fire"))
    with pytest.raises(LostPeer, match="rank 1: disk on fire"):
        leader.gather(Ready, 2, 5, "load")
    follower.close()


def test_a_rank_notices_that_rank_0_is_gone_after_hearing_it_out() -> None:
    leader, keys = Leader("127.0.0.1", KeyPair.make()), KeyPair.make()
    leader.admit([keys.public])
    follower = follow(leader, 1, keys)
    follower.report(Ready(1, 0, 0, 0))
    leader.gather(Ready, 2, 5, "load")
    leader.publish(Step(0, []))
    leader.close()
    assert follower.receive(5) == Step(0, [])
    with pytest.raises(LostPeer, match="rank 0 is gone"):
        follower.receive(5)
    follower.close()


def test_a_rank_that_has_left_is_named_and_the_others_are_still_told_to_stop(leader: Leader) -> None:
    keys = [KeyPair.make() for _ in range(2)]
    leader.admit(pair.public for pair in keys)
    left, stays = [follow(leader, rank, pair) for rank, pair in enumerate(keys, start=1)]
    for rank, follower in enumerate((left, stays), start=1):
        follower.report(Ready(rank, 0, 0, 0))
    leader.gather(Ready, 3, 5, "load")
    left.close()

    def publish_until_it_is_noticed() -> None:
        deadline_s = time.monotonic() + 5
        while time.monotonic() < deadline_s:
            leader.publish(Step(0, []))
            time.sleep(0.01)

    with pytest.raises(LostPeer, match="rank 1 is gone: the control connection to it was lost"):
        publish_until_it_is_noticed()
    leader.stop("no more")
    while (message := stays.receive(5)) == Step(0, []):
        pass
    assert message == Stop("no more")
    stays.close()


def test_waiting_for_rank_0_has_a_deadline(leader: Leader) -> None:
    keys = KeyPair.make()
    leader.admit([keys.public])
    follower = follow(leader, 1, keys)
    with pytest.raises(LockstepError, match=r"rank 0 said nothing for 0.1 s"):
        follower.receive(0.1)
    follower.close()
