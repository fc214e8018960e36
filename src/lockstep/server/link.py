"""The front's end of the link to rank 0: submits, cancels, delivers events, and survives the engine.

Every unfinished request is kept with the tokens its client already has. When another engine appears, each
is submitted again as `prompt + generated` with its seed, and its stream goes on with the same text.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import cast

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from lockstep.engine import wire
from lockstep.engine.request import Cancel, Event, Finished, PromptLogprobs, Rejected, Request, Token
from lockstep.errors import LockstepError
from lockstep.server.inbox import Failed, Inbox

log = logging.getLogger(__name__)

OPEN_PATIENCE_S = 2.0
"""How long frames of an old session may still arrive before a session is opened once more."""
PROBE_DELAYS_S = (0.02, 0.2)
"""ZeroMQ tells of a disconnection a little before it forgets the peer."""


@dataclass
class _Unfinished:
    request: Request
    inbox: Inbox
    since_s: float
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: bool = False
    handed: bool = False
    """Whether the engine has it."""
    cancelled: bool = False

    def continued(self) -> Request:
        """What is still to be done, for an engine that knows nothing of it."""
        return msgspec.structs.replace(
            self.request, generated=list(self.generated), prompt_logprobs=self.prompt_logprobs
        )

    def ended(self, reason: str) -> Finished:
        """The last word on a request, in place of an engine that has gone."""
        prompt_tokens, tokens = len(self.request.prompt), len(self.generated)
        return Finished(self.request.id, reason, prompt_tokens, tokens, cached_tokens=0)


class FrontLink:
    """Start `run` as a task; everything else is called from the same event loop and returns at once."""

    def __init__(self, config: wire.LinkConfig, recovery_timeout_s: float) -> None:
        self.info: wire.EngineInfo | None = None
        """What the last engine said of itself; kept while it is away."""
        self.status: wire.ClusterStatus | None = None
        self.restarts = 0
        self.reason = "the engine has not started yet"
        self.recovered = asyncio.Event()
        """Set while an engine with a loaded model is there."""
        self._config = config
        self._recovery_timeout_s = recovery_timeout_s
        self._away_since_s = time.monotonic()
        self._unfinished: dict[str, _Unfinished] = {}
        self._engine = b""
        self._peer = b""
        """The engine that can be reached now."""
        self._session = ""
        self._opened_s = -OPEN_PATIENCE_S
        self._sent = 0
        self._received = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(wire.EngineFrame)
        self._socket: zmq.asyncio.Socket | None = None

    @property
    def available(self) -> bool:
        return self.recovered.is_set()

    @property
    def unfinished(self) -> int:
        return len(self._unfinished)

    def submit(self, request: Request, inbox: Inbox) -> None:
        """Answer `request` into `inbox`; waits for an engine if there is none."""
        unfinished = _Unfinished(request, inbox, time.monotonic(), prompt_logprobs=request.prompt_logprobs)
        self._unfinished[request.id] = unfinished
        self._hand_over()

    def cancel(self, request_id: str) -> None:
        """Nobody wants more of this; a no-op for a request that has ended."""
        unfinished = self._unfinished.get(request_id)
        if unfinished is None:
            return
        if self.available and unfinished.handed:
            # Kept for the engine's last word.
            unfinished.cancelled = True
            self._command([Cancel(request_id)])
        else:
            del self._unfinished[request_id]

    def fail_all(self, reason: str) -> None:
        """End every unfinished request with this reason."""
        for request_id in list(self._unfinished):
            self._fail(request_id, reason)

    def tell_away(self, reason: str) -> None:
        """The engine has ended, as its supervisor knows for certain."""
        self._leave(reason)

    def listen(self) -> None:
        """Bind, inside the event loop. Raises `LockstepError` if the address is taken."""
        context = zmq.asyncio.Context.instance()
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=_OnlyThisRun(self._config))
        self._socket = context.socket(zmq.ROUTER)
        wire.configure(self._socket)
        self._socket.set(zmq.CURVE_SERVER, 1)
        self._socket.set(zmq.CURVE_SECRETKEY, self._config.front_secret.encode())
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        try:
            self._socket.bind(self._config.address)
        except zmq.ZMQError as error:
            raise LockstepError(f"cannot listen on {self._config.address} for rank 0: {error}") from error

    async def run(self) -> None:
        """Serve the socket until cancelled. Call `listen` first."""
        assert self._socket is not None
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(self._socket))
                tasks.create_task(self._watch(monitor))
                tasks.create_task(self._expire())
        finally:
            self._socket.disable_monitor()
            self._socket.close()
            self._authenticator.stop()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            peer, data = await socket.recv_multipart()
            frame = self._decoder.decode(data)
            stale = frame.session != self._session or peer != self._peer
            if isinstance(frame.body, wire.Hello):
                self._open(peer)
            elif stale:
                patience_over = time.monotonic() - self._opened_s > OPEN_PATIENCE_S
                if patience_over and self._peer in (b"", peer):
                    self._open(peer)
            elif frame.sequence != self._received:
                self._open(peer)
            else:
                self._received += 1
                self._take(frame.body)

    def _take(self, body: wire.Ready | wire.Events | wire.Status | wire.Goodbye | wire.Hello) -> None:
        match body:
            case wire.Events(events):
                for event in events:
                    self._deliver(event)
            case wire.Status(status):
                self.status = status
                if not self.available and status.reason:
                    self.reason = status.reason
            case wire.Ready(info):
                self._ready(info)
            case wire.Goodbye(reason):
                self._leave(reason)

    def _deliver(self, event: Event) -> None:
        unfinished = self._unfinished.get(event.id)
        if unfinished is None:
            return
        match event:
            case Token(_, token):
                unfinished.generated.append(token)
            case PromptLogprobs():
                unfinished.prompt_logprobs = False
            case Finished() | Rejected():
                del self._unfinished[event.id]
        unfinished.inbox.put(event)
        if event.id not in self._unfinished:
            self._hand_over()

    def _hand_over(self) -> None:
        """Give the engine what it has not yet, in order, as far as it has room: some came before it told how
        much that is, and one that has lost a stage has less."""
        if not self.available or self.info is None:
            return
        waiting = [unfinished for unfinished in self._unfinished.values() if not unfinished.handed]
        room = self.info.max_requests - (len(self._unfinished) - len(waiting))
        if handed := waiting[: max(room, 0)]:
            self._command([unfinished.continued() for unfinished in handed])
            for unfinished in handed:
                unfinished.handed = True

    def _open(self, peer: bytes) -> None:
        """Begin a session with this engine, which forgets every request it has."""
        if self._engine not in (b"", peer):
            self.restarts += 1
            self.status = None
            log.warning("a new engine has come (restart %d)", self.restarts)
        self._leave(self.reason if not self.available else "the engine is starting again")
        self._engine = peer
        self._peer, self._session, self._opened_s = peer, uuid.uuid4().hex, time.monotonic()
        self._sent = self._received = 0
        self._send(wire.Open())

    def _ready(self, info: wire.EngineInfo) -> None:
        for unfinished in list(self._unfinished.values()):
            unfinished.handed = False
            if len(unfinished.generated) >= unfinished.request.max_tokens > 0:
                self._deliver(unfinished.ended("length"))
        if self._unfinished:
            log.info("the engine is to finish %d requests", len(self._unfinished))
        self.info = info
        self.reason = ""
        self.recovered.set()
        self._hand_over()

    def _leave(self, reason: str) -> None:
        if self.available:
            self._away_since_s = time.monotonic()
            log.warning("the engine is away: %s", reason)
        self.recovered.clear()
        self.reason = reason or "the engine has ended"
        for unfinished in list(self._unfinished.values()):
            if unfinished.cancelled:
                self._deliver(unfinished.ended("cancelled"))

    def _command(self, commands: list[Request | Cancel]) -> None:
        self._send(wire.Submit(commands))

    def _send(self, body: wire.Open | wire.Submit) -> None:
        assert self._socket is not None
        frame = wire.FrontFrame(self._session, self._sent, body)
        self._sent += 1
        parts = [self._peer, self._encoder.encode(frame)]
        sent = cast("asyncio.Future[object]", self._socket.send_multipart(parts, zmq.NOBLOCK))
        sent.add_done_callback(self._check_sent)

    def _check_sent(self, sent: asyncio.Future[object]) -> None:
        # Unreachable: the connection broke a moment ago. Its next frame, or a new engine, opens a session.
        if not sent.cancelled() and isinstance(sent.exception(), zmq.ZMQError):
            self._peer, self._session, self._opened_s = b"", "", -OPEN_PATIENCE_S
            self._leave("the connection to the engine broke")

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Notice a broken connection soon; silence means nothing, as rank 0 is silent during a long step."""
        while True:
            await monitor.recv_multipart()
            # Some connection ended, perhaps not the engine's: an empty message tells whether it is there.
            for delay_s in PROBE_DELAYS_S:
                await asyncio.sleep(delay_s)
                if self.available:
                    self._command([])

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(1)
            if self.available:
                continue
            now_s = time.monotonic()
            for request_id, unfinished in list(self._unfinished.items()):
                if now_s - max(self._away_since_s, unfinished.since_s) > self._recovery_timeout_s:
                    seconds = f"{self._recovery_timeout_s:g} s"
                    self._fail(request_id, f"No engine for {seconds}: {self.reason}. Try again later.")

    def _fail(self, request_id: str, reason: str) -> None:
        inbox = self._unfinished[request_id].inbox
        self.cancel(request_id)
        self._unfinished.pop(request_id, None)
        inbox.put(Failed(request_id, reason))


class _OnlyThisRun:
    """Lets in nobody but the holder of the engine's key."""

    def __init__(self, config: wire.LinkConfig) -> None:
        self._key = config.engine_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key
