"""One started command with its agent: its pipes, its output and its end. Blocking threads, no polling."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import IO, Any

import msgspec

from lockstep.errors import LockstepError
from lockstep.launch import agent, ssh
from lockstep.launch.environment import SET_BY_LAUNCHERS
from lockstep.launch.job import Command, Job
from lockstep.launch.output import Output
from lockstep.launch.streams import Beats, Greeting, Records, Take

GRACE_S = 2.0
"""Between SIGTERM and SIGKILL, for the ranks."""

_BOOT = "import sys;i=sys.stdin.buffer;exec(i.read(int(i.readline() or 0)))"


@dataclass(frozen=True)
class Ended:
    """A rank's end, or mpirun's own (`rank` None). `reason` says more than the status where it can."""

    rank: int | None
    status: int
    reason: str = ""
    gone: bool = False
    """Whether it ended because its host is out of reach."""


@dataclass(frozen=True)
class Interrupted:
    """A signal asks the launcher to end the run."""

    number: int


Events = queue.SimpleQueue[Ended | Interrupted]


class Process:
    """A rank (or mpirun) that runs from construction on; its end is put into `events`.

    Raises LockstepError when there is no such program, or no room for one more process.
    """

    def __init__(self, command: Command, job: Job, output: Output, events: Events) -> None:
        self._command, self._job, self._output, self._events = command, job, output, events
        self._noise: list[str] = []
        self._greeting = Greeting(self._noise, self._take_stderr)
        self.beats = Beats(self._take_stdout, job.first_beat_s)
        self._pipe_lock = threading.Lock()
        inherits = command.rank == 0 and not command.remote and not job.heard
        argv = agent_argv(command, job)
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=output.out if inherits else subprocess.PIPE,
                stderr=output.err.descriptor if inherits else subprocess.PIPE,
                # Not a session: Linux shares out cores by session, and one whose threads wake each other all
                # the time, as under mpi, was seen to keep the front process off its core for seconds.
                process_group=0,
                bufsize=0,
            )
        except OSError as error:
            absent = command.remote and isinstance(error, FileNotFoundError)
            remedy = ": install an ssh client" if absent else ""
            raise LockstepError(f"cannot start {argv[0]}: {error.strerror}{remedy}") from error
        self._send(_parcel(Path(agent.__file__).read_bytes()) + _parcel(_order(command, job)))
        self._pumps = [
            self._thread(self._pump, stream, take)
            for stream, take in (
                (self._process.stdout, self._take_stdout if job.first_beat_s == inf else self.beats),
                (self._process.stderr, self._stderr_taker()),
            )
            if stream is not None
        ]
        self._waiter = self._thread(self._wait)

    def feed(self, data: bytes) -> None:
        """Hand input to the rank; nothing means its end."""
        self._send(_parcel(data))

    def let_go(self) -> None:
        """Close the lifeline, upon which the agent ends its rank."""
        pipe = self._process.stdin
        assert pipe is not None
        if self._pipe_lock.acquire(timeout=0.5):
            pipe.close()
            self._pipe_lock.release()
        else:  # A blocked write holds the pipe: the connection is stuck, and has to go.
            self._process.kill()

    def join(self, timeout_s: float) -> None:
        """Wait for the end; a process that is late is killed."""
        self._waiter.join(timeout_s)
        if self._waiter.is_alive() and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._waiter.join(2)

    def _send(self, data: bytes) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with self._pipe_lock, contextlib.suppress(BrokenPipeError):
            while data and not pipe.closed:
                data = data[pipe.write(data) :]

    def _wait(self) -> None:
        status = self._process.wait()
        reason = ""
        try:
            for pump in self._pumps:
                pump.join(1)  # A process that escaped its group could hold the pipe for ever.
                while pump.is_alive() and self._output.showing and not self._job.heard:
                    pump.join(1)  # The text that was asked for waits for its reader, as long as he likes.
            if self._command.rank is not None:
                with contextlib.suppress(BrokenPipeError):  # Its end counts, whether it is read or not.
                    self._output.finish(self._command.rank)
            reason = "" if status == 0 else self._reason(status)
        finally:  # Whatever has gone wrong here: whoever waits for this end has no deadline.
            gone = self._command.remote and status == ssh.FAILED
            self._events.put(Ended(self._command.rank, status if status >= 0 else 128 - status, reason, gone))

    def _reason(self, status: int) -> str:
        if self._command.remote and not self._greeting.came:
            return ssh.explain(self._command.host.ssh, status, self._noise, self._job.python)
        if self._command.remote and status == ssh.FAILED:
            return f"lost the ssh connection to {self._command.host.ssh}: is the machine still on?"
        return " ".join(line.strip() for line in self._noise if line.strip(" -\n"))[:300]

    def _pump(self, stream: IO[bytes], take: Take) -> None:
        # Always to the end: a rank whose output nobody takes any more would block as it writes.
        with stream:
            while data := os.read(stream.fileno(), 65536):
                try:
                    take(data)
                except BrokenPipeError:  # `lockstep ... | head`: end like any program whose reader has gone
                    self._events.put(Interrupted(signal.SIGPIPE))

    def _take_stdout(self, data: bytes) -> None:
        rank = self._command.rank
        if rank:
            self._output.tagged(rank, "out", data)
        else:
            self._output.text(data)

    def _stderr_taker(self) -> Take:
        if self._command.rank is None:
            return Records(len(self._job.hosts), self._noise, self._take_record)
        return self._greeting if self._command.remote else self._take_stderr

    def _take_stderr(self, data: bytes) -> None:
        rank = self._command.rank
        if rank:
            self._output.tagged(rank, "err", data)
        else:
            self._output.untagged(data)

    def _take_record(self, rank: int, kind: str, data: bytes) -> None:
        if kind == "x":
            try:
                self._output.finish(rank)
            finally:
                self._events.put(Ended(rank, int(data)))
        elif rank == 0:
            self._output.untagged(data)
        else:
            self._output.tagged(rank, kind, data)

    @staticmethod
    def _thread(target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        return thread


def agent_argv(command: Command, job: Job) -> list[str]:
    """What is started here: the agent itself, or ssh to it."""
    if command.remote:
        return ssh.argv(job, command.host.ssh, [job.python, "-I", "-S", "-c", _BOOT])
    return [sys.executable, "-I", "-S", "-c", _BOOT]


def _order(command: Command, job: Job) -> bytes:
    return msgspec.json.encode(
        {
            "argv": command.argv,
            "env": command.env,
            "unset": SET_BY_LAUNCHERS,
            "files": command.files,
            "ports": command.ports,
            "cwd": job.folder,
            "cwd_must_exist": job.cwd is not None,
            "stdin": _stdin(command, job),
            "mpirun": command.rank is None,
            "grace_s": GRACE_S,
            "greet": command.remote,
        }
    )


def _stdin(command: Command, job: Job) -> str:
    if not job.reads or command.rank:
        return "none"
    return "fifo" if command.rank is None else "pipe"


def _parcel(data: bytes) -> bytes:
    return f"{len(data)}\n".encode() + data
