"""The socket between the front process and rank 0: what crosses it, and rank 0's end of it.

The front binds, rank 0 connects, so that a new engine or a new front finds its way by itself. Both keep a
*session*: the front opens one whenever an engine appears or a message was lost, the engine then forgets
every request, and the front submits anew what is unfinished. Frames of another session are ignored, so no
token can arrive twice.

    engine                       front
    Hello            ──▶                        a new engine, or one that missed something
                     ◀──         Open           a new session: forget everything
    Ready(info)      ──▶                        sent once per session, when the model is loaded
                     ◀──         Submit         requests and cancels
    Events, Status   ──▶
    Goodbye          ──▶                        this engine ends
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from lockstep.engine.request import Cancel, Event, Request

ENVIRONMENT = "LOCKSTEP_LINK"
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000
UNSENT_FRAMES = 1000
"""Frames kept for a front that does not read; beyond this the session is given up."""


class LinkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Address and CURVE keys (Z85) of one run's link. Made once by whoever starts front and ranks."""

    address: str
    front_public: str
    front_secret: str
    engine_public: str
    engine_secret: str

    @staticmethod
    def make(port: int, host: str = "127.0.0.1") -> LinkConfig:
        """Fresh keys for a front that listens on `host:port`."""
        front_public, front_secret = zmq.curve_keypair()
        engine_public, engine_secret = zmq.curve_keypair()
        return LinkConfig(
            address=f"tcp://{host}:{port}",
            front_public=front_public.decode(),
            front_secret=front_secret.decode(),
            engine_public=engine_public.decode(),
            engine_secret=engine_secret.decode(),
        )

    def encode(self) -> str:
        """The value of the environment variable LOCKSTEP_LINK."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(text: str) -> LinkConfig:
        return msgspec.json.decode(text, type=LinkConfig)


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the front must know of a loaded engine."""

    vocab_size: int
    max_context: int
    """Most tokens of prompt and answer together that one request may have."""
    max_requests: int
    """Most requests that can be running or waiting."""


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One rank as rank 0 last heard of it. `layers` is (first, last + 1) in a pipeline."""

    rank: int
    host: str
    pid: int
    device: str = ""
    layers: tuple[int, int] | None = None
    cut: str = ""
    weight_bytes: int = 0
    active_bytes: int = 0
    peak_bytes: int = 0
    last_step: int = -1
    phase: str = ""


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run as rank 0 sees it. `reason` says why it is not ready, or why it last restarted."""

    model: str
    backend: str = ""
    parallel: str = ""
    ranks: list[RankStatus] = []
    waiting: int = 0
    running: int = 0
    kv_tokens: int = 0
    kv_tokens_capacity: int = 0
    prompt_cache_tokens: int = 0
    steps: int = 0
    restarts: int = 0
    reason: str = ""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """An engine has no session and wants one."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Events(msgspec.Struct, frozen=True, tag=True):
    events: list[Event]


class Status(msgspec.Struct, frozen=True, tag=True):
    status: ClusterStatus


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """This engine ends, for this reason."""

    reason: str


class EngineFrame(msgspec.Struct, frozen=True, array_like=True):
    """`sequence` counts the frames of a session from 0, so that a lost one is noticed."""

    session: str
    sequence: int
    body: Hello | Ready | Events | Status | Goodbye


class Open(msgspec.Struct, frozen=True, tag=True):
    """A new session begins: forget every request of the one before."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    commands: list[Request | Cancel]


class FrontFrame(msgspec.Struct, frozen=True, array_like=True):
    session: str
    sequence: int
    body: Open | Submit


class Forget(msgspec.Struct, frozen=True):
    """Nobody waits for any request any more: drop all of them, running or waiting, without an answer."""


def configure(socket: zmq.Socket[Any]) -> None:
    """Notice a dead or frozen peer, never wait for one on close."""
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.LINGER, 0)


class EngineLink:
    """Rank 0's end. Used by one thread; nothing here blocks except `poll` with a timeout.

    `run` names this start of the engine and must be new for each process.
    """

    def __init__(self, config: LinkConfig, run: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        """For a `zmq.Poller` that waits for other sockets too; readable means: call `poll`."""
        configure(self.socket)
        self.socket.set(zmq.IDENTITY, run.encode())
        self.socket.set(zmq.RECONNECT_IVL, 100)
        self.socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        self.socket.set(zmq.SNDHWM, UNSENT_FRAMES)
        self.socket.set(zmq.CURVE_SERVERKEY, config.front_public.encode())
        self.socket.set(zmq.CURVE_PUBLICKEY, config.engine_public.encode())
        self.socket.set(zmq.CURVE_SECRETKEY, config.engine_secret.encode())
        self.socket.connect(config.address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FrontFrame)
        self._info: EngineInfo | None = None
        self._session = ""
        self._sent = 0
        self._received = 0
        self._forget = False
        self._send(Hello())

    def ready(self, info: EngineInfo) -> None:
        """The model is loaded: requests may come. Call once."""
        self._info = info
        if self._session:
            self._send(Ready(info))

    def poll(self, timeout_s: float = 0.0) -> list[Request | Cancel | Forget]:
        """Everything that has arrived, in order; waits up to `timeout_s` for the first of it."""
        commands: list[Request | Cancel | Forget] = self._forgotten()
        waited = bool(commands) or self.socket.poll(round(timeout_s * 1000))
        while waited and self.socket.poll(0):
            new = self._take(self._decoder.decode(self.socket.recv()))
            commands = (self._forgotten() or commands) + new
        return commands

    def _forgotten(self) -> list[Request | Cancel | Forget]:
        forget, self._forget = self._forget, False
        return [Forget()] if forget else []

    def send(self, events: Sequence[Event]) -> None:
        """One message with all of these events, in order."""
        if events and self._session:
            self._send(Events(list(events)))

    def status(self, status: ClusterStatus) -> None:
        """Tell how the run is; the caller decides how often (once a second, or on change)."""
        self._send(Status(status))

    def close(self, reason: str) -> None:
        """Tell the front why this engine ends, as far as that is possible within 0.2 s."""
        self._send(Goodbye(reason))
        self.socket.close(linger=200)

    def _take(self, frame: FrontFrame) -> list[Request | Cancel | Forget]:
        if isinstance(frame.body, Open):
            self._session, self._sent, self._received, self._forget = frame.session, 0, 1, True
            if self._info is not None:
                self._send(Ready(self._info))
            return []
        if frame.session != self._session:
            return []
        if frame.sequence != self._received:
            self._lose_session()
            return []
        self._received += 1
        return list(frame.body.commands)

    def _send(self, body: Hello | Ready | Events | Status | Goodbye) -> None:
        frame = EngineFrame(self._session, self._sent, body)
        self._sent += 1
        try:
            self.socket.send(self._encoder.encode(frame), zmq.NOBLOCK)
        except zmq.Again:
            self._session, self._forget = "", True

    def _lose_session(self) -> None:
        self._session, self._sent, self._forget = "", 0, True
        self._send(Hello())


def link_from_environment() -> LinkConfig | None:
    """The link that the starter of this process made, if any."""
    text = os.environ.get(ENVIRONMENT)
    return LinkConfig.decode(text) if text else None
