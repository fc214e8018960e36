from __future__ import annotations

import time

import msgspec
import pytest
import zmq

from lockstep.engine.link import EngineLink
from lockstep.engine.request import Cancel, Forget, Request, Token
from lockstep.engine.wire import (
    EngineFrame,
    EngineInfo,
    Events,
    FrontFrame,
    Hello,
    LinkConfig,
    Open,
    Ready,
    Submit,
    configure,
)
from ranks import free_ports

INFO = EngineInfo(vocab_size=10, max_context=20, max_requests=9)
REQUEST = Request(id="a", prompt=[1], max_tokens=2)


class Front:
    """The other end, by hand."""

    def __init__(self, config: LinkConfig):
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        configure(self.socket)
        self.socket.set(zmq.CURVE_SERVER, 1)
        self.socket.set(zmq.CURVE_SECRETKEY, config.front_secret.encode())
        self.socket.set(zmq.ROUTER_HANDOVER, 1)
        self._bind(config.address)

    def _bind(self, address: str) -> None:
        # ZeroMQ closes sockets in a thread of its own: the port may be taken for a moment longer.
        for _ in range(100):
            try:
                return self.socket.bind(address)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE:
                    raise
                time.sleep(0.05)
        raise TimeoutError(f"{address} is still taken")

    def receive(self) -> EngineFrame:
        assert self.socket.poll(5000), "nothing came"
        self.peer, frame = self.socket.recv_multipart()
        return msgspec.msgpack.decode(frame, type=EngineFrame)

    def send(self, session: str, sequence: int, body: Open | Submit):
        self.socket.send_multipart([self.peer, msgspec.msgpack.encode(FrontFrame(session, sequence, body))])


@pytest.fixture
def config():
    return LinkConfig.make(free_ports(1)[0])


@pytest.fixture
def link(config):
    link = EngineLink(config, "run-1")
    yield link
    link.socket.close(linger=0)


@pytest.fixture
def front(config):
    front = Front(config)
    yield front
    front.socket.close(linger=0)


def open_session(front: Front, link: EngineLink, session: str):
    front.send(session, 0, Open())
    assert link.poll(5) == [Forget()]


def test_the_environment_value_keeps_address_and_keys(config):
    assert LinkConfig.decode(config.encode()) == config


def test_a_session_is_opened_before_anything_else(front, link):
    assert front.receive() == EngineFrame("", 0, Hello())
    link.ready(INFO)
    link.send([Token("a", 1)])
    front.send("s", 0, Open())
    assert link.poll(5) == [Forget()]
    assert front.receive() == EngineFrame("s", 0, Ready(INFO)), "no events of no session"
    front.send("s", 1, Submit([REQUEST]))
    front.send("s", 2, Submit([Cancel("a")]))
    received = []
    while len(received) < 2:
        received += link.poll(5)
    assert received == [REQUEST, Cancel("a")]
    link.send([Token("a", 1), Token("a", 2)])
    assert front.receive() == EngineFrame("s", 1, Events([Token("a", 1), Token("a", 2)]))


def test_a_new_session_drops_what_the_old_one_asked_for(front, link):
    front.receive()
    link.ready(INFO)
    open_session(front, link, "s")
    front.send("s", 1, Submit([REQUEST]))
    front.send("t", 0, Open())
    front.send("t", 1, Submit([Cancel("b")]))
    received = []
    while not received or received[-1] != Cancel("b"):
        received += link.poll(5)
    assert received[-2:] == [Forget(), Cancel("b")]


def test_a_lost_command_makes_the_engine_ask_for_a_new_session(front, link):
    front.receive()
    open_session(front, link, "s")
    front.send("s", 2, Submit([REQUEST]))
    assert link.poll(5) == [Forget()]
    assert front.receive().body == Hello()


def test_commands_of_another_session_are_ignored(front, link):
    front.receive()
    open_session(front, link, "s")
    front.send("old", 1, Submit([REQUEST]))
    front.send("s", 1, Submit([Cancel("b")]))
    received = []
    while not received:
        received += link.poll(5)
    assert received == [Cancel("b")]


def test_a_front_that_comes_back_on_the_same_address_finds_the_engine(config, link):
    first = Front(config)
    assert first.receive().body == Hello()
    open_session(first, link, "s")
    first.socket.close(linger=0)
    second = Front(config)
    try:
        link.ready(INFO)
        # What is sent before ZeroMQ has noticed that the first is gone is lost; an engine always goes on.
        for _ in range(100):
            link.send([Token("a", 1)])
            if second.socket.poll(50):
                break
        assert second.receive().session == "s", "the engine's frames tell the new front that there is one"
        open_session(second, link, "t")
    finally:
        second.socket.close(linger=0)


def test_a_poll_with_nothing_to_read_returns_after_its_timeout(link):
    assert link.poll(0.05) == []


def test_a_front_that_stands_still_for_some_seconds_misses_nothing(front, link):
    front.receive()
    open_session(front, link, "s")
    steps = 9000
    row = [Token(f"row {number}", number) for number in range(100)]
    for _ in range(steps):
        link.send(row)
    assert link.poll(0) == [], "the session was given up"
    assert [front.receive().sequence for _ in range(steps)] == list(range(steps))
