"""What crosses the socket between the front process and rank 0.

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
from typing import Any

import msgspec
import zmq

from lockstep.engine.request import Cancel, Event, Request

ENVIRONMENT = "LOCKSTEP_LINK"
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000


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


def configure(socket: zmq.Socket[Any]) -> None:
    """Notice a dead or frozen peer, never wait for one on close."""
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.LINGER, 0)


def link_from_environment() -> LinkConfig | None:
    """The link that the starter of this process made, if any."""
    text = os.environ.get(ENVIRONMENT)
    return LinkConfig.decode(text) if text else None
