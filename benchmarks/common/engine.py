"""Ranks without HTTP: the benchmark is the front process, and speaks to rank 0 over the link."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from common.processes import BenchmarkError, Program
from lockstep.engine import wire
from lockstep.engine.request import Finished, Rejected, Request, Token

FIRST_ID = 300
"""Token ids below it are bytes and end tokens in our random models."""
RECONNECTION_S = 15.0
"""An idle engine that got no core for some seconds was taken for dead, and connects again."""
SHORT = 2
"""Tokens of a generation that a longer one is compared with."""


@dataclass(frozen=True)
class Timing:
    """A generation of `rows` sequences at once: until all have their first token, until the end, and the time
    in which each got so many `decoded` tokens."""

    rows: int
    prompt: int
    first_s: float
    wall_s: float
    decoded: int
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.rows * self.prompt / self.first_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.rows * self.decoded / self.decode_s

    @property
    def token_s(self) -> float:
        """Per token of one sequence, after the first."""
        return self.decode_s / self.decoded


class Link:
    """The front process's end, for one engine. `address` may be `ipc://`, which passes network namespaces."""

    def __init__(self, address: str) -> None:
        self.config = msgspec.structs.replace(wire.LinkConfig.make(1), address=address)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        wire.configure(self._socket)
        self._socket.set(zmq.CURVE_SERVER, 1)
        self._socket.set(zmq.CURVE_SECRETKEY, self.config.front_secret.encode())
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)
        self._decode = msgspec.msgpack.Decoder(wire.EngineFrame).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._peer = b""
        self._sent = 0
        self.info: wire.EngineInfo | None = None

    def listen(self, timeout_s: float) -> list[Any]:
        """The events that come within `timeout_s`, or sooner; opens the session by itself."""
        if not self._socket.poll(round(1000 * timeout_s)):
            return []
        peer, data = self._socket.recv_multipart()
        body = self._decode(data).body
        if isinstance(body, wire.Hello):
            self._peer, self._sent = peer, 0
            self._send(wire.Open())
        elif isinstance(body, wire.Ready):
            self.info = body.info
        return body.events if isinstance(body, wire.Events) else []

    def submit(self, requests: Sequence[Request]) -> None:
        self._send(wire.Submit(list(requests)))

    def close(self) -> None:
        self._socket.close()

    def _send(self, body: wire.Open | wire.Submit) -> None:
        frame = [self._peer, self._encode(wire.FrontFrame("bench", self._sent, body))]
        self._sent += 1
        deadline_s = time.monotonic() + RECONNECTION_S
        while True:
            try:
                self._socket.send_multipart(frame)
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.05)


class Engine:
    """The ranks of one run of `lockstep serve`, started by `start`, which is given their environment."""

    def __init__(self, label: str, folder: Path, start: Callable[[Mapping[str, str]], Program]) -> None:
        self.label = label
        self._link = Link(f"ipc://{folder}/{random.getrandbits(64):x}.link")
        self._rng = random.Random(0)
        self._requests = 0
        self.program = start({wire.ENVIRONMENT: self._link.config.encode()})

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.program.stop()
        self._link.close()

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self._link.info is None:
            if time.monotonic() > deadline_s or not self.program.running:
                raise BenchmarkError(f"{self.label} is not ready:\n{self.program.tail(30)}")
            self._link.listen(0.2)

    def generate(self, rows: int, prompt: int, tokens: int, timeout_s: float = 120) -> Timing:
        """Greedy continuations of random prompts, all asked for at once.

        Decoding is what a generation of more tokens takes longer. Ranks that use all cores can keep the first
        token from us for several steps.
        """
        first_s, short_s = self._generate(rows, prompt, min(tokens, SHORT), timeout_s)
        if tokens <= SHORT:
            return Timing(rows, prompt, first_s, short_s, 0, 0.0)
        other_first_s, wall_s = self._generate(rows, prompt, tokens, timeout_s)
        first_s = min(first_s, other_first_s)
        return Timing(rows, prompt, first_s, wall_s, tokens - SHORT, wall_s - short_s)

    def _generate(self, rows: int, prompt: int, tokens: int, timeout_s: float) -> tuple[float, float]:
        """How long until all have their first token, and until the end."""
        requests = [self._request(prompt, tokens) for _ in range(rows)]
        began_s = time.perf_counter()
        self._link.submit(requests)
        first: dict[str, float] = {}
        left = {request.id for request in requests}
        while left:
            if time.perf_counter() - began_s > timeout_s or not self.program.running:
                raise BenchmarkError(f"{self.label} did not finish in {timeout_s} s\n{self.program.tail(30)}")
            for event in self._link.listen(1.0):
                if isinstance(event, Token):
                    first.setdefault(event.id, time.perf_counter())
                elif isinstance(event, Rejected):
                    raise BenchmarkError(f"{self.label}: {event.reason}")
                elif isinstance(event, Finished):
                    left.discard(event.id)
        return max(first.values()) - began_s, time.perf_counter() - began_s

    def quieten(self) -> None:
        """Idle ranks sleep by themselves."""

    def wake(self) -> None:
        self.generate(1, 4, 2)

    def _request(self, prompt: int, tokens: int) -> Request:
        assert self._link.info is not None, "wait_until_ready() first"
        self._requests += 1
        last = self._link.info.vocab_size - 1
        ids = [self._rng.randint(FIRST_ID, last) for _ in range(prompt)]
        return Request(id=f"{self._requests}", prompt=ids, max_tokens=tokens)


class Copies:
    """Engines that do the same at the same time, and need not wait for each other."""

    def __init__(self, label: str, start: Sequence[Callable[[], Engine]]) -> None:
        self.label = label
        with ExitStack() as stack:
            self._engines = [stack.enter_context(start_one()) for start_one in start]
            self._running = stack.pop_all()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        for each in self._engines:
            each.wait_until_ready(timeout_s)

    def generate(self, rows: int, prompt: int, tokens: int, timeout_s: float = 120) -> Timing:
        """Of all their sequences together, in the time that they take on average."""
        with ThreadPoolExecutor(len(self._engines)) as threads:
            began = [threads.submit(each.generate, rows, prompt, tokens, timeout_s) for each in self._engines]
            done = [each.result() for each in began]

        def mean(name: str) -> float:
            return statistics.mean(getattr(timing, name) for timing in done)

        times_s = {name: mean(name) for name in ("first_s", "wall_s", "decode_s")}
        return Timing(len(done) * rows, prompt, decoded=done[0].decoded, **times_s)

    def quieten(self) -> None:
        """As each of them."""

    def wake(self) -> None:
        for each in self._engines:
            each.wake()


class Loop:
    """mlx-lm's model in a bare loop (programs/bare_loop.py), on one rank or several."""

    def __init__(self, label: str, program: Program) -> None:
        """`program` was started with `stdin`."""
        self.label = label
        self.program = program
        self.blas = ""

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.stop()

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        self.blas = msgspec.json.decode(self.program.listen(timeout_s))["blas"]

    def generate(self, rows: int, prompt: int, tokens: int, timeout_s: float = 120) -> Timing:
        """As the engine does, timed by rank 0; the rows are one batch from the beginning to the end."""
        figures = msgspec.json.decode(self.program.ask(f"{rows} {prompt} {tokens}", timeout_s))
        first_s, wall_s = figures["first_s"], figures["wall_s"]
        return Timing(rows, prompt, first_s, wall_s, tokens - 1, wall_s - first_s)

    def quieten(self) -> None:
        """Its ranks wait in a collective, which would burn the cores of the others."""
        self.program.pause()

    def wake(self) -> None:
        self.program.resume()
        self.generate(1, 4, 2)
