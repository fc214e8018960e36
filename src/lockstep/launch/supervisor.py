"""Keeps a server up: the front process and the ranks, each started again when it ends too early."""

from __future__ import annotations

import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from math import inf
from types import FrameType

from lockstep.errors import LockstepError, UsageError, complaint
from lockstep.launch import launcher, names, writer
from lockstep.launch.agent import CANNOT_START
from lockstep.launch.blame import Outcome
from lockstep.launch.fronts import SPARE_AGAIN_S, Fronts
from lockstep.launch.hostfile import Host
from lockstep.launch.job import Job
from lockstep.launch.launcher import Running
from lockstep.launch.restarts import Reach, Restarts
from lockstep.launch.silence import Silence
from lockstep.runtime.environment import ATTEMPT, RESTART_REASON
from lockstep.runtime.options import Deadlines
from lockstep.server.notice import Notice

DRAIN_MARGIN_S = 5.0
GIVE_UP_S = 3.0
"""For the front process to tell its clients that there is no engine any more."""

DEFAULT_LINK_PORT = 32300
"""Of a front process on another machine, whose free ports are not known here."""


def link_port(host: Host, taken: int = 0) -> int:
    """A port other than `taken` on rank 0's host where front process and rank 0 can meet."""
    if not names.is_local(host.ssh):
        return DEFAULT_LINK_PORT
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports: list[int] = [listener.getsockname()[1] for listener in (first, second)]
        return ports[0] if ports[0] != taken else ports[1]


@dataclass(frozen=True)
class Policy:
    """How much is done to keep the server up. `fits` raises UsageError for hosts that are too few.

    `begin_s`: within which the front process, and a rank without others, have to give their first beat.
    """

    restarts: int = 3
    min_ranks: int = 1
    drain_s: float = 30.0
    spare_front: bool = True
    begin_s: float = Deadlines.join_s
    fits: Callable[[Sequence[Host]], object] = lambda hosts: None


@dataclass(frozen=True)
class _Ended:
    running: Running
    outcome: Outcome


@dataclass(frozen=True)
class _Signal:
    number: int


class Supervisor:
    """Runs the front process and the ranks of `job` until it is told to stop or has to give up."""

    def __init__(self, job: Job, front_env: Mapping[str, str], policy: Policy) -> None:
        """`front_env` is for the front process alone; it runs on rank 0's host."""
        env = {**job.env, **front_env}
        self._job = replace(job, stdin=False, heard=True)
        front = replace(self._job, hosts=job.hosts[:1], backend="ring", env=env)
        self._front_job = replace(front, first_beat_s=policy.begin_s)
        self._policy = policy
        self._rank_restarts, self._front_restarts = Restarts(policy.restarts), Restarts(policy.restarts)
        self._reach, self._silence = Reach(), Silence()
        self._events: queue.SimpleQueue[_Ended | _Signal] = queue.SimpleQueue()
        self._attempt = 0
        self._reason = ""
        self._status: int | None = None
        self._stop_at_s: float | None = None
        self._start_at_s: float | None = None
        self._front_at_s: float | None = None
        self._fronts: Fronts
        self._ranks: Running | None = None
        self._began_s: dict[Running, float] = {}
        """All that runs."""

    def run(self) -> int:
        """The exit status: 0 after an orderly stop, otherwise that of what ended it all."""
        for number in (heeded := launcher.stop_signals()):
            signal.signal(number, self._take_signal)
        self._fronts = Fronts(self._front_job, self._start, self._policy.spare_front)
        try:
            self._start_ranks()
            while self._status is None:
                self._handle(self._next())
        finally:
            if self._ranks is not None:
                self._ranks.end()
            self._fronts.end()
            writer.stderr().flush()
            # Python gives its own handlers back as it exits: one more Ctrl-C would change the exit status.
            for number in heeded:
                signal.signal(number, signal.SIG_IGN)
        return self._status

    def _take_signal(self, number: int, frame: FrameType | None) -> None:
        self._events.put(_Signal(number))

    def _next(self) -> _Ended | _Signal | None:
        """What happens next; None when a time that was waited for has come."""
        planned = (self._stop_at_s, self._start_at_s, self._front_at_s, self._fronts.spare_due_s)
        next_s = min([self._silence.look_s(self._began_s), *(at for at in planned if at is not None)])
        try:
            return self._events.get(timeout=max(0.0, next_s - time.monotonic()) if next_s < inf else None)
        except queue.Empty:
            return None

    def _handle(self, event: _Ended | _Signal | None) -> None:
        match event:
            case _Signal():
                self._stop()
            case _Ended(running) if running not in self._began_s:
                pass  # It was ended here, and what follows from that has been done.
            case _Ended(running, outcome) if running is self._fronts.serving:
                self._after_front(outcome)
            case _Ended(running, outcome) if running is self._ranks:
                self._after_ranks(outcome)
            case _Ended(running, outcome) if self._fronts.lost(running):
                del self._began_s[running]
                _say(f"the spare front process ended ({_how(outcome)})")
            case None:
                self._keep_time(time.monotonic())

    def _keep_time(self, now_s: float) -> None:
        if self._stop_at_s is not None and now_s >= self._stop_at_s:
            self._status = 0
        elif self._start_at_s is not None and now_s >= self._start_at_s:
            self._start_ranks_again()
        elif self._front_at_s is not None and now_s >= self._front_at_s:
            self._replace_front()
        elif self._fronts.spare_due_s is not None and now_s >= self._fronts.spare_due_s:
            self._add_spare()
        elif (running := self._silence.find(self._began_s, now_s)) is not None:
            self._handle(_Ended(running, self._silent(running, now_s - running.beats.heard_s)))

    def _silent(self, running: Running, seconds: float) -> Outcome:
        """The outcome of a process that is there and does nothing."""
        how = f"not answered for {seconds:.0f} s"
        if running is not self._ranks:
            return Outcome(LockstepError.exit_status, reason=f"it had {how}")
        host = self._job.hosts[0].ssh
        return Outcome(LockstepError.exit_status, 0, host, f"rank 0 (host {host}) has {how}")

    def _stop(self) -> None:
        """The first signal drains, the second ends at once."""
        if self._stop_at_s is not None or self._front_at_s is not None:  # Without a front, nothing drains.
            self._status = 0
            return
        self._stop_at_s = time.monotonic() + self._policy.drain_s + DRAIN_MARGIN_S
        self._fronts.tell(Notice(drain=True))

    def _start(self, job: Job) -> Running:
        running = launcher.start(job)
        self._began_s[running] = time.monotonic()
        threading.Thread(target=self._await, args=(running,), daemon=True).start()
        return running

    def _await(self, running: Running) -> None:
        outcome = Outcome(LockstepError.exit_status, reason="the launcher cannot tell how it ended")
        try:
            outcome = running.wait()
        finally:
            self._events.put(_Ended(running, outcome))

    def _start_ranks(self) -> None:
        self._start_at_s = None
        env = {**self._job.env, ATTEMPT: str(self._attempt), RESTART_REASON: self._reason}
        # Several ranks watch each other.
        first_beat_s = self._policy.begin_s if len(self._job.hosts) == 1 else inf
        self._ranks = self._start(replace(self._job, env=env, first_beat_s=first_beat_s))

    def _start_ranks_again(self) -> None:
        try:
            self._start_ranks()
        except LockstepError as error:
            _write(complaint(str(error)))
            self._plan_ranks(Outcome(error.exit_status, reason=str(error)), lived_s=0.0)

    def _after_front(self, outcome: Outcome) -> None:
        lived_s = time.monotonic() - self._began_s.pop(self._fronts.serving)
        self._fronts.serving.end()
        if outcome.status in (0, UsageError.exit_status) or self._stop_at_s is not None:
            self._status = outcome.status
            return
        self._plan_front(outcome, lived_s)

    def _plan_front(self, outcome: Outcome, lived_s: float) -> None:
        """Another front process, if that is not too often, for one that has ended or could not be started."""
        wait_s = self._front_restarts.wait_s(time.monotonic(), lived_s)
        if wait_s is None:
            _say("the front process ended too often")
            self._status = outcome.status
            return
        _say(f"the front process ended ({_how(outcome)}): starting it again{_in(wait_s)}")
        self._front_at_s = time.monotonic() + wait_s

    def _replace_front(self) -> None:
        self._front_at_s = None
        try:
            self._fronts.replace()
        except LockstepError as error:
            self._plan_front(Outcome(error.exit_status, reason=str(error)), lived_s=0.0)

    def _add_spare(self) -> None:
        try:
            self._fronts.add_spare()
        except LockstepError as error:
            _say(f"no spare front process: {error}; trying again{_in(SPARE_AGAIN_S)}")

    def _after_ranks(self, outcome: Outcome) -> None:
        assert self._ranks is not None
        lived_s = time.monotonic() - self._began_s.pop(self._ranks)
        self._fronts.tell(Notice(_how(outcome)))
        self._ranks.end()
        self._ranks.explain(outcome)
        self._ranks = None
        self._plan_ranks(outcome, lived_s)

    def _plan_ranks(self, outcome: Outcome, lived_s: float) -> None:
        """Other ranks, if that is not too often, for some that have ended or could not be started."""
        self._reason = _how(outcome)
        final = outcome.status in (UsageError.exit_status, CANNOT_START)
        wait_s = None if final else self._rank_restarts.wait_s(time.monotonic(), lived_s)
        if wait_s is None:
            return self._give_up(outcome)
        if self._reach.lost(outcome.host if outcome.gone else None) and not self._leave_out(outcome.host):
            return self._give_up(outcome)
        self._attempt += 1
        _say(f"starting the ranks again{_in(wait_s)} (restart {self._attempt})")
        self._start_at_s = time.monotonic() + wait_s
        return None

    def _leave_out(self, host: str | None) -> bool:
        """Go on without a host that is gone; whether that is possible."""
        left = [other.ssh != host for other in self._job.hosts]
        rest = tuple(
            replace(other, rdma=tuple(compress(other.rdma, left)))
            for other in compress(self._job.hosts, left)
        )
        if len(rest) < self._policy.min_ranks or not left[0]:
            return False
        try:
            self._policy.fits(rest)
        except LockstepError as error:
            _say(f"cannot go on without {host}: {error}")
            return False
        self._job = replace(self._job, hosts=rest)
        self._reason = f"{self._reason}; going on without {host}, with {len(rest)} ranks"
        _say(f"{host} is out of reach: going on with {len(rest)} ranks")
        return True

    def _give_up(self, outcome: Outcome) -> None:
        _say("giving up")
        self._fronts.tell(Notice(_how(outcome), ending=True))
        deadline_s = time.monotonic() + GIVE_UP_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                event = self._events.get(timeout=left_s)
            except queue.Empty:
                break
            if isinstance(event, _Signal) or event.running is self._fronts.serving:
                break
        self._status = outcome.status or LockstepError.exit_status


def _how(outcome: Outcome) -> str:
    return outcome.reason or f"exit status {outcome.status}"


def _in(seconds: float) -> str:
    return f" in {seconds:g} s" if seconds else ""


def _say(line: str) -> None:
    _write(f"lockstep: {line}")


def _write(line: str) -> None:
    writer.stderr().write(f"{line}\n".encode())
