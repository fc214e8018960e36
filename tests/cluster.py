"""A real `lockstep serve` with a tiny model and streaming clients, to break and look at."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from command import marked_processes
from model import tiny
from ranks import SOURCE, clean_env, mpi_env
from tiny_tokenizer import byte_level

TOKENS = 400


def tiny_checkpoint(folder: Path) -> Path:
    """A random llama of 6 layers with a tokenizer of 320 tokens."""
    model = byte_level(folder / "model")
    tiny.save("llama", model, vocab_size=320, max_position_embeddings=4096)
    return model


@dataclass
class Stream(threading.Thread):
    """One streaming client. `arrived_s` are the times of its pieces of text, by time.monotonic().

    It hangs up after `leave_after` pieces, if that is set.
    """

    url: str
    prompt: str
    max_tokens: int = TOKENS
    timeout_s: float = 120
    text: str = ""
    error: str = ""
    arrived_s: list[float] = field(default_factory=list)
    began_s: float = 0.0
    leave_after: int | None = None

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        self.began_s = time.monotonic()
        body = {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                for line in reply:
                    self._take(line)
                    if self.leave_after is not None and len(self.arrived_s) >= self.leave_after:
                        return
        except OSError as error:
            self.error = str(error)

    def _take(self, line: bytes) -> None:
        if not line.startswith(b"data: {"):
            return
        event: dict[str, Any] = json.loads(line[6:])
        self.error = self.error or json.dumps(event.get("error", ""))[1:-1]
        text = "".join(choice["text"] for choice in event.get("choices", []))
        if text:
            self.arrived_s.append(time.monotonic())
            self.text += text

    def gap_after_s(self, moment_s: float) -> float | None:
        """From `moment_s` to the first text that came after the longest silence around it."""
        times = [self.began_s, *self.arrived_s]
        gaps = [(b - a, b) for a, b in zip(times, times[1:], strict=False) if b > moment_s]
        return max(gaps)[1] - moment_s if gaps else None

    @property
    def longest_silence_s(self) -> float:
        times = [self.began_s, *self.arrived_s]
        return max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0)


class Cluster:
    """`lockstep serve` as a process of its own. Leave the `with` block to end it."""

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.log = folder / f"serve-{self.mark[:6]}.log"
        given = clean_env()
        given |= {k: v for k, v in mpi_env().items() if k != "LOCKSTEP_BACKEND"}
        given |= {"PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1", "LOCKSTEP_TEST_MARK": self.mark}
        given["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", "")])
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep", "serve", "--port", "0", *arguments],
                env=given | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.url = ""

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float = 90) -> Cluster:
        deadline_s = time.monotonic() + timeout_s
        while not (said := re.search(r" at (http://\S+)", self.output)):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline_s, self.output
            time.sleep(0.05)
        self.url = said[1]
        return self

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        return dict(self._get("/cluster/status"))

    def wait_status(self, wanted: Any, timeout_s: float = 60) -> dict[str, Any]:
        """The first status for which `wanted` is true."""
        deadline_s = time.monotonic() + timeout_s
        while not wanted(status := self.status()):
            assert time.monotonic() < deadline_s, f"{status}\n{self.output[-3000:]}"
            time.sleep(0.05)
        return status

    def answers(self) -> bool:
        """Whether the front process is there and has an engine."""
        try:
            return bool(self._get("/ready"))
        except OSError:
            return False

    def pid(self, rank: int) -> int:
        """The process of a rank of the engine that runs now."""
        status = self.wait_status(lambda s: s["ready"] and s["ranks"])
        return int(status["ranks"][rank]["pid"])

    def front(self) -> psutil.Process:
        """The front process that serves, neither its agent nor its spare."""
        fronts = (p for p in marked_processes(self.mark) if "lockstep.server.front" in p.cmdline())
        return next(p for p in fronts if _listens(p))

    def spare_front(self) -> psutil.Process | None:
        """The front process that waits, if it is there already."""
        spares = (p for p in marked_processes(self.mark) if p.cmdline()[-1:] == ["--spare"])
        return next((p for p in spares if not _listens(p)), None)

    def stream(self, prompt: str, max_tokens: int = TOKENS) -> Stream:
        stream = Stream(self.url, prompt, max_tokens)
        stream.start()
        return stream

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """The exit status, once nothing of the cluster runs any more."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(timeout_s)
        finally:
            self.process.kill()
            for left in marked_processes(self.mark):
                left.kill()
        return self.process.returncode

    def left(self, within_s: float = 5) -> list[psutil.Process]:
        """What still runs of this cluster, a moment after its end."""
        deadline_s = time.monotonic() + within_s
        while (found := marked_processes(self.mark)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return found

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            return json.loads(reply.read())


def _listens(process: psutil.Process) -> bool:
    return any(connection.status == "LISTEN" for connection in process.net_connections("tcp"))
