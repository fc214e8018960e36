"""The watchdog: one thread on every rank that sees to it that nothing blocks for ever.

It looks at progress, not at life. Each rank's watchdog reports to rank 0's, and rank 0's to all; rank 0's
decides (see verdict.py). When a deadline has passed it names the rank that held up the others, and every
rank leaves at once, whatever its main thread is blocked in: mlx lets go of the GIL while it evaluates.
A rank that has no others to watch it makes beats for its supervisor (see beats.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import msgspec
import zmq

from lockstep.errors import LockstepError, LostPeer, complaint
from lockstep.runtime.beats import NO_BEAT, SILENCE_S, Beat
from lockstep.runtime.leaving import leave
from lockstep.runtime.options import Deadlines
from lockstep.runtime.progress import AGREEING, IDLE, JOINING, STARTING, Progress
from lockstep.runtime.verdict import IDLE_INTERVAL_S, QUIET_S, End, Report, Seen, patience_s, silent, stalled

TICK_S = 1.0
FAREWELL_S = 0.2
"""For rank 0's last word to reach the other ranks."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Report | End).decode


class Watchdog:
    """Create it first of all: it watches the imports too. The rank's main thread owns it."""

    def __init__(self, rank: int, deadlines: Deadlines, beat: Beat = NO_BEAT) -> None:
        self.deadlines = deadlines
        self.progress = Progress(deadlines.step_s)
        self.progress.enter(STARTING, deadlines.join_s)
        self.duty = "its share"
        self.measure: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Bytes of mlx arrays, now and at most; to be set when mlx is there."""
        self._beat = beat
        self._rank, self._host = rank, socket.gethostname()
        self._socket: zmq.Socket[bytes] | None = None
        self._handed_over: zmq.Socket[bytes] | None = None
        self._seen: dict[int, Seen] = {}
        self._reported = ("", 0.0)
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def attach(self, ranks: zmq.Socket[bytes]) -> None:
        """From now on talk to the other ranks over this socket, which the watchdog closes."""
        self._handed_over = ranks
        os.write(self._waker, b"a")

    def stop(self) -> None:
        """Watch no more. Call before the socket's context is destroyed."""
        os.close(self._waker)
        self._thread.join()
        os.close(self._wake)

    def reports(self) -> dict[int, Report]:
        """What each rank has last said of itself, as far as it is known here."""
        return {rank: seen.report for rank, seen in dict(self._seen).items()} | {self._rank: self._own()}

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException:  # noqa: BLE001 (without this thread, no wait has a deadline any more)
            reason = complaint(f"the watchdog of rank {self._rank} failed")
            leave(LockstepError.exit_status, f"{traceback.format_exc()}{reason}\n")

    def _watch(self) -> None:
        awake_s, fair_s = time.monotonic(), 0.0
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(round(TICK_S * 1000)))
            if self._wake in ready:
                if not os.read(self._wake, 1):
                    break
                self._socket, self._handed_over = self._handed_over, None
                poller.register(self._socket, zmq.POLLIN)
            self._receive()
            now_s = time.monotonic()
            if now_s - awake_s > QUIET_S:
                fair_s = now_s + QUIET_S  # This process was stopped itself: the others may be well.
            awake_s = now_s
            if now_s >= fair_s:
                self._judge(now_s)
            self._report(now_s)
            self._beat(max(SILENCE_S, patience_s(self.progress.now, self.deadlines.step_s)))
        if self._socket is not None:
            self._socket.close(linger=0)

    def _receive(self) -> None:
        while self._socket is not None and self._socket.poll(0):
            message = _decode(self._socket.recv_multipart()[-1])
            if isinstance(message, End):
                self._obey(message)
            if message.rank not in self._seen:
                self._reported = ("", 0.0)  # Who has just come has not heard of this rank yet.
            now_s = time.monotonic()
            since_s = now_s - message.snapshot.since_s
            snapshot = msgspec.structs.replace(message.snapshot, since_s=since_s)
            self._seen[message.rank] = Seen(msgspec.structs.replace(message, snapshot=snapshot), now_s)
            if self._rank == 0 and self.progress.ledger.contradicts(snapshot.started):
                name = self._seen[message.rank].name
                self._end(f"{name} executed another step {snapshot.started.index} than rank 0", True)

    def _judge(self, now_s: float) -> None:
        me = Seen(self._own(), now_s)
        others = [self._seen[rank] for rank in sorted(self._seen)]
        if self._rank == 0:
            floor_s = self.deadlines.step_s
            reason = stalled(now_s, me, others) or silent(now_s, me, others, floor_s)
            if reason:
                self._end(reason)
        elif others:
            self._judge_rank_0(now_s, me, others[0])
        if self._rank:
            self._judge_start(now_s, me)

    def _judge_rank_0(self, now_s: float, me: Seen, seen: Seen) -> None:
        # A moment later than rank 0 itself would: if it can still decide, it knows more.
        reason = silent(now_s - TICK_S, me, [seen], self.deadlines.step_s)
        if reason:
            leave(LostPeer.exit_status, f"{complaint(reason)}\n")

    def _judge_start(self, now_s: float, me: Seen) -> None:
        """Other ranks than 0 judge themselves only until they execute steps: rank 0 may not know them yet."""
        now, late_s = self.progress.now, now_s - self.progress.now.since_s
        if now.started.index < 0 and 0 < now.deadline_s < late_s - TICK_S:
            waiting = now.phase in (JOINING, AGREEING)
            status = LostPeer.exit_status if waiting else LockstepError.exit_status
            reason = complaint(f"{me.name} has been {now.phase} for {late_s:.0f} s and gives up")
            leave(status, f"{reason}\n")

    def _report(self, now_s: float) -> None:
        if self._socket is None:
            return
        phase, reported_s = self._reported
        own = self._own()
        due_s = reported_s + (IDLE_INTERVAL_S if own.snapshot.phase == IDLE else 0.9 * TICK_S)
        if own.snapshot.phase == phase and now_s < due_s:
            return
        self._reported = (own.snapshot.phase, now_s)
        age_s = now_s - own.snapshot.since_s
        snapshot = msgspec.structs.replace(own.snapshot, since_s=age_s)
        self._send(msgspec.structs.replace(own, snapshot=snapshot))

    def _own(self) -> Report:
        return Report(self._rank, self._host, self.duty, self.progress.now, *self.measure())

    def _send(self, message: Report | End) -> None:
        assert self._socket is not None
        frame = _encode(message)
        if self._rank:
            self._socket.send(frame, zmq.NOBLOCK)
        for rank in self._seen if self._rank == 0 else ():
            self._socket.send_multipart([str(rank).encode(), frame], zmq.NOBLOCK)

    def _end(self, reason: str, show_steps: bool = False) -> NoReturn:
        """Rank 0's decision."""
        try:
            if self._socket is not None:
                self._send(End(reason, show_steps))
                time.sleep(FAREWELL_S)
        finally:
            steps = self._last_steps() if show_steps else ""
            leave(LockstepError.exit_status, f"{steps}{complaint(reason)}\n")

    def _obey(self, end: End) -> NoReturn:
        # Rank 0 first: were this rank's connection to break now, rank 0 would blame it.
        time.sleep(2 * FAREWELL_S)
        leave(LostPeer.exit_status, self._last_steps() if end.show_steps else "")

    def _last_steps(self) -> str:
        return f"lockstep: last steps of rank {self._rank}: {self.progress.ledger.last()}\n"


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM when the body takes longer: even when it never lets go of the GIL."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
