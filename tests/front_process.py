"""A real front process for the tests, and a scripted rank 0 that speaks the link's protocol.

The scripted rank 0 answers every prompt with the same words over and over, which depend on the prompt and the
seed only, so that each client can know its own text in advance. Where it is shown tools, it calls them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from lockstep.engine.link import EngineLink
from lockstep.engine.request import (
    Cancel,
    Command,
    Event,
    Finished,
    Forget,
    Logprobs,
    PromptLogprobs,
    Rejected,
    Request,
    Token,
)
from lockstep.engine.text import Tokenizer, decode
from lockstep.engine.wire import ENVIRONMENT as LINK_ENVIRONMENT
from lockstep.engine.wire import ClusterStatus, EngineInfo, LinkConfig, RankStatus
from lockstep.server.settings import ENVIRONMENT as SERVER_ENVIRONMENT
from lockstep.server.settings import ServerSettings
from ranks import SOURCE, free_ports

CONTEXT = 2048
CALLS = """I shall look.
<tool_call>
{"name": "weather", "arguments": {"city": "Orléans 🙂", "days": 2}}
</tool_call>
<tool_call>
{"name": "time", "arguments": {}}
</tool_call>"""


def answer_tokens(tokenizer: Tokenizer, request: Request) -> list[int]:
    """What the scripted rank 0 says: words chosen by prompt and seed, 40 tokens of them, or calls."""
    if "<tools>" in decode(tokenizer, request.prompt):
        return tokenizer.encode(CALLS, add_special_tokens=False)
    words = tokenizer.encode(" the quick brown fox jumps over lazy dog été 🙂\n", add_special_tokens=False)
    start = (sum(request.prompt) + (request.sampling.seed if request.sampling.temperature else 0)) % len(
        words
    )
    return [words[(start + i) % len(words)] for i in range(40)]


@dataclass
class ScriptedEngine:
    """Rank 0 by script, in a thread. `delay_s` passes before each round of one token per request."""

    link: LinkConfig
    tokenizer: Tokenizer
    run: str
    delay_s: float = 0.0
    refuse: str = ""
    running: dict[str, tuple[Request, list[int]]] = field(default_factory=dict)
    seen: list[Command] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._goodbye: str | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self, goodbye: str | None = None) -> None:
        """End at once; with a `goodbye`, say why."""
        self._goodbye = goodbye
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        link = EngineLink(self.link, self.run)
        link.ready(EngineInfo(vocab_size=len(self.tokenizer), max_context=CONTEXT, max_requests=500))
        told_s = 0.0
        while not self._stop.is_set():
            events: list[Event] = []
            for command in link.poll(self.delay_s if self.running else 0.05):
                self.seen.append(command)
                events += self._obey(command)
            for request_id in list(self.running):
                events += self._advance(request_id)
            link.send(events)
            if time.monotonic() - told_s > 0.5:
                told_s = time.monotonic()
                link.status(self._status())
        if self._goodbye is None:
            link.socket.close(linger=0)
        else:
            link.close(self._goodbye)

    def _obey(self, command: Command) -> list[Event]:
        if isinstance(command, Forget):
            self.running.clear()
            return []
        if isinstance(command, Cancel):
            if command.id not in self.running:
                return []
            return [self._finished(command.id, "cancelled")]
        if self.refuse:
            return [Rejected(command.id, self.refuse, retry=self.refuse.startswith("full"))]
        words = answer_tokens(self.tokenizer, command)
        assert command.generated == words[: len(command.generated)], "resubmitted with what was said before"
        self.running[command.id] = (command, words[len(command.generated) :])
        if command.prompt_logprobs:
            scores = [None, *(Logprobs(-float(i), []) for i in range(1, len(command.prompt)))]
            return [PromptLogprobs(command.id, scores)]
        return []

    def _advance(self, request_id: str) -> list[Event]:
        request, words = self.running[request_id]
        events: list[Event] = []
        if words:
            token = words.pop(0)
            top = request.sampling.logprobs
            scores = None if top is None else Logprobs(-0.5, [(token + i, -0.5 - i) for i in range(top)])
            events.append(Token(request_id, token, scores))
        said = len(answer_tokens(self.tokenizer, request)) - len(words)
        if not words or said >= request.max_tokens:
            events.append(self._finished(request_id, "length" if said >= request.max_tokens else "stop"))
        return events

    def _finished(self, request_id: str, reason: str) -> Finished:
        request, words = self.running.pop(request_id)
        said = len(answer_tokens(self.tokenizer, request)) - len(words)
        return Finished(request_id, reason, len(request.prompt), said, cached_tokens=3, queue_s=0.01)

    def _status(self) -> ClusterStatus:
        rank = RankStatus(rank=0, host="here", pid=os.getpid(), layers=(0, 2), last_step=7)
        return ClusterStatus(model="tiny", ranks=[rank], running=len(self.running))


@dataclass
class FrontProcess:
    """`python -m lockstep.server.front` and where to reach it."""

    process: subprocess.Popen[str]
    url: str
    stderr: Path

    def wait_ready(self, timeout_s: float = 30) -> None:
        self.wait_http("/ready", 200, timeout_s)

    def wait_http(self, path: str, status: int, timeout_s: float = 30) -> None:
        """Until this path answers with this status."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.stderr.read_text()
            try:
                if httpx2.get(self.url + path, verify=False).status_code == status:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"{path} never answered {status}\n{self.stderr.read_text()}")

    def end(self, timeout_s: float = 10) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextmanager
def front_process(
    folder: Path, link: LinkConfig, workdir: Path, port: int | None = None, **settings: object
) -> Iterator[FrontProcess]:
    """A front that serves the tokenizer in `folder`; killed at the end if it still runs."""
    port = port or free_ports(1)[0]
    told = ServerSettings(model=str(folder), served_name="org/tiny", port=port, **settings)
    stderr = workdir / f"front-{time.monotonic_ns()}.log"
    environment = os.environ | {
        SERVER_ENVIRONMENT: told.encode(),
        LINK_ENVIRONMENT: link.encode(),
        "PYTHONPATH": str(SOURCE),
    }
    with stderr.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lockstep.server.front"], env=environment, stderr=log, text=True
        )
    try:
        yield FrontProcess(process, told.url, stderr)
    finally:
        process.kill()
        process.wait()
