"""Start a job's ranks and wait for their end; blame.py tells which one failed and why.

run(job)      start, wait, explain; Ctrl-C ends every rank everywhere
start(job)    for a caller that starts again by itself: Running.wait() -> Outcome, Running.end()
dry_run(job)  the commands, files and environments, as text
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from types import FrameType

from lockstep.errors import LockstepError, complaint
from lockstep.launch import backends, writer
from lockstep.launch.blame import Cause, Outcome, blame, cause
from lockstep.launch.job import Command, Job
from lockstep.launch.output import Output
from lockstep.launch.process import GRACE_S, Ended, Events, Interrupted, Process, agent_argv
from lockstep.launch.streams import Beats
from lockstep.runtime.leaving import FINALIZE_S, UNFINALIZED

SETTLE_S = 0.3
"""How long to look for an earlier failure: the end of one rank makes its neighbours fail at once."""

PATIENCE_S = 1.5
"""The same while every rank that ended blames another one."""

REST_S = FINALIZE_S
"""For the other ranks to end, once rank 0 has ended well."""

_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def run(job: Job) -> int:
    """Run `job` to its end; returns the exit status: 0, the failed rank's, or 128 + signal.

    Raises UsageError or LockstepError when the job cannot be started. Call it from the main thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    running = Running(job)
    try:
        with _signals(running):
            try:
                running.start()
                outcome = running.wait()
            finally:
                running.end()
            running.explain(outcome)
            return outcome.status
    finally:
        writer.stderr().flush()


def start(job: Job) -> Running:
    """Start every rank and return at once. The caller must call `end()`.

    Raises UsageError or LockstepError when the job cannot be started; nothing of it is left then.
    """
    running = Running(job)
    try:
        running.start()
    except LockstepError:
        running.end()
        raise
    return running


def stop_signals() -> list[signal.Signals]:
    """The signals that end a run, without those that we were started to ignore, as `nohup` has it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


class Running:
    """The processes of one run."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._commands = backends.commands(job)
        self._output = Output([host.ssh for host in job.hosts])
        self._events: Events = queue.SimpleQueue()
        self._processes: list[Process] = []
        self._ended_well: list[int | None] = []

    def start(self) -> None:
        for command in self._commands:
            self._processes.append(Process(command, self._job, self._output, self._events))
        if self._job.stdin:
            threading.Thread(target=self._forward_stdin, daemon=True).start()

    def wait(self) -> Outcome:
        """Block until every rank has ended well, or the first failure. Ends nothing: call `end()`.

        Ranks that have not ended some time after rank 0 did are no failure: nothing more is wanted of them.
        """
        pending: set[int | None] = set(range(len(self._job.hosts)))
        pending |= {command.rank for command in self._commands}
        rest_until_s: float | None = None
        while pending:
            try:
                event = self._events.get(timeout=rest_until_s and max(0.0, rest_until_s - time.monotonic()))
            except queue.Empty:
                return self._abandon(pending)
            if isinstance(event, Interrupted):
                return Outcome(128 + event.number)
            if self._job.backend == "mpi" and event == Ended(0, UNFINALIZED):
                return self._abandon(pending - {0, None})
            if event.status != 0:
                return blame(self._settle(event), self._job, self._output, self._ended_well)
            self._ended_well.append(event.rank)
            pending.discard(event.rank)
            if event.rank is None:
                pending.clear()
            if event.rank == 0:
                rest_until_s = time.monotonic() + REST_S
        return self._complete()

    def _abandon(self, pending: Collection[int | None]) -> Outcome:
        """Rank 0 has ended well and these have not."""
        ranks = sorted(rank for rank in pending if rank is not None)
        names = [f"rank {rank} (host {self._job.hosts[rank].ssh})" for rank in ranks] or ["mpirun"]
        reason = f"{' and '.join(names)} did not end within {REST_S:g} s after rank 0"
        with contextlib.suppress(BrokenPipeError):
            self._output.say(f"lockstep: {reason}: ended now")
        return self._complete(reason)

    def _complete(self, reason: str = "") -> Outcome:
        if lost := self._output.lost:
            return Outcome(1, reason=f"cannot write to standard output: {lost.strerror}")
        return Outcome(0, reason=reason, told=True)

    def feed(self, data: bytes) -> None:
        """Hand input to rank 0 of a job that is `fed`."""
        self._processes[0].feed(data)

    @property
    def beats(self) -> Beats:
        """Of rank 0, in a job that makes them."""
        return self._processes[0].beats

    def interrupt(self, number: int) -> None:
        """Make `wait` return with 128 + `number`. Safe in a signal handler."""
        self._events.put(Interrupted(number))

    def end(self) -> None:
        """End every rank that still runs, everywhere, and wait for it: SIGTERM, then SIGKILL after 2 s."""
        closing = [threading.Thread(target=process.let_go) for process in self._processes]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        deadline = time.monotonic() + GRACE_S + 1.5
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def explain(self, outcome: Outcome) -> None:
        """Write the culprit's last lines and the line that names it."""
        with contextlib.suppress(BrokenPipeError):  # There is nobody to explain it to.
            if outcome.rank is not None:
                self._output.remind(outcome.rank)
            if outcome.reason and not outcome.told:
                self._output.say(complaint(outcome.reason))

    def _settle(self, first: Ended) -> list[Ended]:
        """The failures that belong to `first`, itself included, in the order of their arrival."""
        failures, began = [first], time.monotonic()
        while True:
            cautious = all(cause(failure, self._job) is Cause.CONSEQUENCE for failure in failures)
            left = began + (PATIENCE_S if cautious else SETTLE_S) - time.monotonic()
            try:
                event = self._events.get(timeout=max(0.0, left))
            except queue.Empty:
                return failures
            if isinstance(event, Interrupted):
                self._events.put(event)
                return failures
            if event.status == 0:
                self._ended_well.append(event.rank)
            else:
                failures.append(event)

    def _forward_stdin(self) -> None:
        given = self._job.stdin
        for data in [given] if isinstance(given, bytes) else _read_stdin():
            self._processes[0].feed(data)
        self._processes[0].feed(b"")


def dry_run(job: Job) -> str:
    """Exactly what `run` would start: per process its host, command, folder, environment and files."""
    return "\n".join(_describe(command, job) for command in backends.commands(job))


def _describe(command: Command, job: Job) -> str:
    who = f"mpirun for {len(job.hosts)} ranks" if command.rank is None else f"rank {command.rank}"
    lines = [f"{who} on {command.host.ssh}{'' if command.remote else ' (this machine)'}"]
    if command.remote:
        lines.append(f"  through: {shlex.join(agent_argv(command, job)[:-1])}")
    lines += [f"  folder: {job.folder}", f"  command: {shlex.join(command.argv)}"]
    for name, value in sorted(command.env.items()):
        secret = any(mark in name for mark in _SECRET) and value
        lines.append(f"  env: {name}={'***' if secret else value}")
    lines += [f"  file: {name}: {text}" for name, text in command.files.items()]
    lines += [f"  listens on: {ip}:{port}" for ip, port in command.ports]
    return "\n".join(lines)


def _read_stdin() -> Iterator[bytes]:
    """What comes, to its end, which is at once where there is nothing that we can read."""
    with contextlib.suppress(OSError):  # It may be closed, or open for writing alone.
        while _may_read_stdin() and (data := os.read(0, 65536)):
            yield data


def _may_read_stdin() -> bool:
    """Whether reading would not stop us: only a terminal's foreground job may read from it."""
    try:
        return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def _signals(running: Running) -> Iterator[None]:
    def handle(number: int, _: FrameType | None) -> None:
        running.interrupt(number)

    numbers = stop_signals()
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
