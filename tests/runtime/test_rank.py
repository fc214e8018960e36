"""Where rank 0 listens for the others."""

from __future__ import annotations

import socket

import pytest

from lockstep.errors import LockstepError
from lockstep.runtime import rank
from lockstep.runtime.environment import RankEnvironment

FAR = RankEnvironment(rank=0, size=3, local_size=2, backend="mpi")


def named(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's name has this address, or none that anybody knows."""

    def look_up(name: str) -> str:
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return address

    monkeypatch.setattr(socket, "gethostbyname", look_up)


def no_route() -> str:
    raise OSError("Network is unreachable")


def test_ranks_of_one_machine_meet_on_loopback() -> None:
    assert rank._control_address(RankEnvironment(size=2, local_size=2, backend="mpi")) == "127.0.0.1"


def test_the_address_that_was_given_is_taken() -> None:
    env = RankEnvironment(size=2, backend="mpi", addresses=("10.0.0.1",))
    assert rank._control_address(env) == "10.0.0.1"


@pytest.mark.parametrize(
    ("name", "found"), [("10.1.1.1", "10.1.1.1"), ("127.0.1.1", "10.2.2.2"), (None, "10.2.2.2")]
)
def test_other_machines_are_never_sent_to_loopback(
    name: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(name, monkeypatch)
    monkeypatch.setattr(rank, "_routed_address", lambda: "10.2.2.2")
    assert rank._control_address(FAR) == found


@pytest.mark.parametrize("name", ["127.0.1.1", None])
def test_a_machine_that_does_not_know_its_address_says_what_to_set(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(name, monkeypatch)
    monkeypatch.setattr(rank, "_routed_address", no_route)
    with pytest.raises(LockstepError, match="set LOCKSTEP_ADDRESS to rank 0's address"):
        rank._control_address(FAR)
