"""Rank 0's end of the socket to the front process."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import zmq

from lockstep.engine.request import Command, Event, Forget
from lockstep.engine.wire import (
    ClusterStatus,
    EngineFrame,
    EngineInfo,
    Events,
    FrontFrame,
    Goodbye,
    Hello,
    LinkConfig,
    Open,
    Ready,
    Status,
    configure,
)

UNSENT_FRAMES = 10_000
"""Frames kept for a front that does not read; beyond this the session is given up. No model makes as many
until the heartbeat tells that the front is gone: one that is only kept from its core loses nothing."""


class EngineLink:
    """Rank 0's end. Used by one thread; nothing here blocks except `poll` with a timeout.

    `run` names this start of the engine and must be new for each process.
    """

    def __init__(self, config: LinkConfig, run: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
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

    def poll(self, timeout_s: float = 0.0) -> list[Command]:
        """Everything that has arrived, in order; waits up to `timeout_s` for the first of it."""
        commands: list[Command] = self._forgotten()
        waited = bool(commands) or self.socket.poll(round(timeout_s * 1000))
        while waited and self.socket.poll(0):
            new = self._take(self._decoder.decode(self.socket.recv()))
            commands = (self._forgotten() or commands) + new
        return commands

    def _forgotten(self) -> list[Command]:
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

    def _take(self, frame: FrontFrame) -> list[Command]:
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
