"""The control plane: rank 0 tells every rank the next step, ranks report to rank 0.

One ROUTER socket on rank 0, one DEALER on each other rank, encrypted and authenticated with CURVE keys
that are made for the run. Rank 0 admits only the keys of its own ranks. Messages are msgspec structs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from lockstep.engine.step import Stop
from lockstep.errors import LockstepError, LostPeer
from lockstep.runtime.messages import Failed, FromRank, Message, ToRank

ADMISSION_TIMEOUT_S = 10.0

_encode = msgspec.msgpack.Encoder().encode
_decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
_decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode


class KeyPair(msgspec.Struct, frozen=True):
    """A CURVE key pair in Z85: 40 ASCII characters each."""

    public: bytes
    secret: bytes

    @classmethod
    def make(cls) -> KeyPair:
        return cls(*zmq.curve_keypair())


class Leader:
    """Rank 0's end. Not thread-safe: rank 0's main thread owns it."""

    def __init__(self, address: str, keys: KeyPair) -> None:
        """Listen on a free port of `address`; nobody is admitted until `admit` is called."""
        self._context = zmq.Context()
        self.keys = keys
        self._guard = ThreadAuthenticator(self._context)
        self._guard.start()
        self._guard.configure_curve_callback(credentials_provider=self)
        self._admitted: frozenset[bytes] = frozenset()
        self._decided = threading.Event()
        self._ranks: list[bytes] = []
        self._socket, self.port = self._listen(address)
        self._socket.router_mandatory = True
        self.watch, self.watch_port = self._listen(address)
        """Handed to the watchdog's thread, which closes it."""

    def _listen(self, address: str) -> tuple[zmq.Socket[bytes], int]:
        socket = self._context.socket(zmq.ROUTER)
        _harden(socket)
        socket.ipv6 = ":" in address
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.keys.public, self.keys.secret
        return socket, socket.bind_to_random_port(f"tcp://{_bracketed(address)}")

    def admit(self, public_keys: Iterable[bytes]) -> None:
        """Accept connections made with these keys, and no others."""
        self._admitted = frozenset(public_keys)
        self._decided.set()

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator's thread for each connection (ZAP, RFC 27).

        A rank may connect a moment before rank 0 has read the same introductions; a refusal is final.
        """
        return self._decided.wait(ADMISSION_TIMEOUT_S) and key in self._admitted

    def gather(self, kind: type[Message], size: int, timeout_s: float, what: str) -> list[Message]:
        """Wait until ranks 1..size-1 have each said one `kind`; returns them in rank order.

        Raises LostPeer with the first failure that a rank reports, LockstepError naming the silent ranks.
        """
        deadline = time.monotonic() + timeout_s
        said: dict[int, Message] = {}
        while len(said) < size - 1:
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0 or not self._socket.poll(left_ms):
                silent = ", ".join(str(r) for r in range(1, size) if r not in said)
                raise LockstepError(f"rank {silent} did not {what} in {timeout_s:g} s: look at its output")
            identity, frame = self._socket.recv_multipart()
            message = _decode_from_rank(frame)
            if isinstance(message, Failed):
                raise LostPeer(f"rank {message.rank}: {message.reason}")
            if not isinstance(message, kind):
                raise LockstepError(f"rank {message.rank} said {type(message).__name__} out of turn")
            said[message.rank] = message
            if identity not in self._ranks:
                self._ranks.append(identity)
        return [said[rank] for rank in sorted(said)]

    def publish(self, message: ToRank) -> None:
        """Send to every rank, in order; returns before they have received it. Raises LostPeer."""
        frame = _encode(message)
        for identity in self._ranks:
            self._send(identity, frame)
        # zmq's thread sends it: it may share this core, whose next work takes milliseconds.
        os.sched_yield()

    def stop(self, reason: str = "") -> None:
        """Tell every rank that is still there to end; a `reason` means that the run has failed."""
        frame = _encode(Stop(reason))
        for identity in self._ranks:
            with contextlib.suppress(LostPeer):  # It has ended before it was told.
                self._send(identity, frame)

    def _send(self, identity: bytes, frame: bytes) -> None:
        try:
            self._socket.send_multipart([identity, frame])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            rank = identity.decode()
            raise LostPeer(f"rank {rank} is gone: the control connection to it was lost") from error

    def close(self) -> None:
        """Deliver what was published (for at most a second) and let go of the port."""
        self._guard.stop()
        self._context.destroy(linger=1000)


class Follower:
    """Another rank's end. Not thread-safe: the rank's main thread owns it."""

    def __init__(
        self, rank: int, address: str, ports: tuple[int, int], server_key: bytes, keys: KeyPair
    ) -> None:
        """`ports` are those of rank 0's two sockets: for steps, and for the watchdog."""
        self._context = zmq.Context()
        self._rank, self._server_key, self._keys = rank, server_key, keys
        self._socket = self._dealer()
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.watch = self._dealer()
        """Handed to the watchdog's thread, which closes it."""
        for socket, port in zip((self._socket, self.watch), ports, strict=True):
            socket.ipv6 = ":" in address
            socket.connect(f"tcp://{_bracketed(address)}:{port}")
        self._poller = zmq.Poller()
        for socket in (self._socket, self._monitor):
            self._poller.register(socket, zmq.POLLIN)

    def _dealer(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        _harden(socket)
        socket.identity = str(self._rank).encode()
        socket.curve_serverkey = self._server_key
        socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
        return socket

    def report(self, message: FromRank) -> None:
        self._socket.send(_encode(message))

    def waiting(self, timeout_s: float | None) -> bool:
        """Whether a message is there, or comes within `timeout_s` (None: however long it takes).

        Raises LostPeer when rank 0 is gone and everything it said has been received.
        """
        ready = dict(self._poller.poll(None if timeout_s is None else int(timeout_s * 1000)))
        if self._socket in ready:
            return True
        if self._monitor in ready:
            raise LostPeer("rank 0 is gone: the control connection to it was lost")
        return False

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message from rank 0. Without a timeout this sleeps until there is one.

        Raises LockstepError when `timeout_s` passes, LostPeer when rank 0 is gone.
        """
        if not self.waiting(timeout_s):
            raise LockstepError(f"rank 0 said nothing for {timeout_s:g} s: look at its output")
        return _decode_to_rank(self._socket.recv())

    def close(self) -> None:
        """Deliver what was reported (for at most a second)."""
        self._socket.disable_monitor()
        self._context.destroy(linger=1000)


def _harden(socket: zmq.Socket[bytes]) -> None:
    """No message is dropped for want of room, and a vanished peer is noticed."""
    socket.set_hwm(0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10000)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
