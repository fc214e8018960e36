"""The engine behind the front process: what `lockstep serve` runs on every rank."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence

import mlx.core as mx
import msgspec

from lockstep.engine.grammar import Grammars
from lockstep.engine.link import EngineLink
from lockstep.engine.request import Command, Event, Finished, Forget, Rejected, Request
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.wire import ClusterStatus, EngineInfo, LinkConfig, RankStatus
from lockstep.errors import LockstepError
from lockstep.runtime.environment import ATTEMPT, RESTART_REASON
from lockstep.runtime.opening import open_session
from lockstep.runtime.options import EngineOptions, ModelOptions, Tell
from lockstep.runtime.place import Place
from lockstep.runtime.session import Member, Session
from lockstep.runtime.verdict import Report

STATUS_INTERVAL_S = 1.0


def serve(
    place: Place,
    options: ModelOptions,
    engine: EngineOptions,
    link: LinkConfig | None,
    front: subprocess.Popen[bytes] | None,
    tell: Tell,
) -> None:
    """Serve until rank 0's `front` process ends, if it is rank 0's own child, or else for ever.

    `link` is rank 0's way to it, and nobody else's. Raises LockstepError when the run cannot start or go on.
    """

    def answer_the_front(session: Session) -> None:
        assert link is not None, "rank 0 needs a front process"
        scheduler = Scheduler(session.limits(engine))
        source = FrontSource(session, scheduler, link, front)
        grammars = Grammars(session.path, session.loaded.shard.vocab_size)
        try:
            session.lead(scheduler, source, grammars)
        except LockstepError as error:
            source.leave(str(error))
            raise

    open_session(place, options, tell, engine.max_rows).run(answer_the_front)


class QueueTimes:
    """How long requests waited before their first step, to within one step."""

    def __init__(self, is_waiting: Callable[[str], bool]) -> None:
        self._is_waiting = is_waiting
        self._arrived_s: dict[str, float] = {}
        self._waited_s: dict[str, float] = {}

    def note(self, commands: Sequence[Command]) -> None:
        """Requests that have come, and those that have started since the last call."""
        now_s = time.monotonic()
        for started in [name for name in self._arrived_s if not self._is_waiting(name)]:
            self._waited_s[started] = now_s - self._arrived_s.pop(started)
        self._arrived_s |= {c.id: now_s for c in commands if isinstance(c, Request)}

    def add(self, event: Event) -> Event:
        """The event, with the time its request waited if it is the last one."""
        if not isinstance(event, Finished | Rejected):
            return event
        self._arrived_s.pop(event.id, None)
        waited_s = self._waited_s.pop(event.id, 0.0)
        return msgspec.structs.replace(event, queue_s=waited_s) if isinstance(event, Finished) else event


class FrontSource:
    """A source whose requests come from the front process, which is also told how the run is doing."""

    def __init__(
        self,
        session: Session,
        scheduler: Scheduler,
        config: LinkConfig,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """`process` is the front process where this one has started it, None where it is looked after."""
        self._process = process
        self._session = session
        self._scheduler = scheduler
        self._link = EngineLink(config, run=uuid.uuid4().hex)
        self._arrived: list[Command] = []
        self._queue_times = QueueTimes(scheduler.is_waiting)
        self._told_at = 0.0
        self._link.ready(
            EngineInfo(
                vocab_size=session.loaded.shard.vocab_size,
                max_context=min(session.max_context, session.kv_tokens),
                max_requests=scheduler.limits.most_requests,
            )
        )

    @property
    def closed(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def poll(self) -> Sequence[Command]:
        commands = [*self._arrived, *self._link.poll()]
        self._arrived = []
        if self.closed:
            commands.append(Forget())
        self._queue_times.note(commands)
        if any(isinstance(command, Forget) for command in commands):
            self._told_at = 0.0  # A session has just begun, and the front knows nothing of this run.
        self._tell_status()
        return commands

    def wait(self) -> None:
        mx.clear_cache()
        self._session.watchdog.progress.idle()
        self._arrived += self._link.poll(STATUS_INTERVAL_S)

    def leave(self, reason: str) -> None:
        """Tell the front process why this engine ends."""
        self._link.close(reason)

    def deliver(self, events: Sequence[Event]) -> None:
        self._link.send([self._queue_times.add(event) for event in events])

    def _tell_status(self) -> None:
        now = time.monotonic()
        if now - self._told_at >= STATUS_INTERVAL_S:
            self._told_at = now
            self._link.status(self._status())

    def _status(self) -> ClusterStatus:
        session, scheduler = self._session, self._scheduler
        reports = session.watchdog.reports()
        return ClusterStatus(
            model=session.name,
            backend=session.backend,
            parallel=session.parallel,
            ranks=[
                _rank_status(member, reports.get(member.rank), session.assignment.parallel)
                for member in session.members
            ],
            waiting=scheduler.waiting,
            running=scheduler.running,
            kv_tokens=scheduler.reserved_tokens,
            kv_tokens_capacity=session.kv_tokens,
            prompt_cache_tokens=scheduler.cached_tokens,
            steps=session.watchdog.progress.now.done + 1,
            restarts=int(os.environ.get(ATTEMPT, "0")),
            reason=os.environ.get(RESTART_REASON, ""),
        )


def _rank_status(member: Member, report: Report | None, form: str) -> RankStatus:
    """One rank, as far as it has told of itself."""
    pipeline = form == "pipeline"
    known = RankStatus(
        rank=member.rank,
        host=member.host,
        pid=member.pid,
        device=member.device,
        layers=member.layers if pipeline else None,
        weight_bytes=member.weight_bytes,
        peak_bytes=member.peak_memory_bytes,
    )
    if report is None:
        return known
    return msgspec.structs.replace(
        known,
        cut="" if pipeline else report.duty,
        active_bytes=report.active_bytes,
        peak_bytes=report.peak_bytes,
        last_step=report.snapshot.done,
        phase=report.snapshot.phase,
    )
