"""Where rank 0 gets its steps: it makes them, publishes them, and delivers what comes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from math import inf

import mlx.core as mx

from lockstep.engine.executor import Pending
from lockstep.engine.grammar import Allowed, Grammars
from lockstep.engine.request import Cancel, Event, Forget, Rejected, Request
from lockstep.engine.sampler import Draw, Score
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.sequence import Sequence as Row
from lockstep.engine.step import Decode, Step
from lockstep.model.precision import computes_on_cpu
from lockstep.runtime.channel import Leader
from lockstep.runtime.source import Source


class LedSteps:
    """Rank 0's side of the loop: commands in, steps out, events back."""

    def __init__(
        self, scheduler: Scheduler, source: Source, channel: Leader | None, grammars: Grammars | None = None
    ) -> None:
        """`channel` is None when rank 0 is the only rank; `grammars` where no request has one."""
        self._grammars = grammars
        self._scheduler = scheduler
        self._source = source
        self._channel = channel
        self._results: dict[int, Draw | Score] = {}
        self._published: deque[Step] = deque()
        self._events: list[Event] = []
        # On CPU mlx works off most of a step while it is handed over: it must be finished before anything
        # else, or its tokens, and with them the other ranks' next step, would wait for a newer one. A decode
        # that goes ahead is that next step, and may begin behind one other.
        self._most_in_flight = 1 if computes_on_cpu() else inf
        self._most_with_one_ahead = self._most_in_flight + scheduler.limits.look_ahead
        self._in_flight = 0

    def __iter__(self) -> Iterator[Step | None]:
        while True:
            if self._in_flight == self._most_with_one_ahead:
                yield None
            self._listen()
            while (step := self._scheduler.next_step()) is not None:
                if self._channel is not None:
                    self._channel.publish(step)
                self._published.append(step)
            self._deliver()
            if self._published and self._may_start(self._published[0]):
                self._in_flight += 1
                yield self._published.popleft()
            elif self._in_flight:
                yield None
            elif self._source.closed:
                if self._channel is not None:
                    self._channel.stop()
                return
            else:
                self._source.wait()

    def finish(self, step: Step, output: mx.array) -> Sequence[mx.array]:
        """What is wanted of `output`, logits [rows, length, vocabulary], before it is evaluated.

        A decode draws a token for each row, if `output` is not those tokens; a prefill with logits scores the
        prompt's own tokens.
        """
        rows = self._scheduler.rows(step)
        if not isinstance(step.forward, Decode):
            targets = mx.array(self._scheduler.targets(step))
            result: Draw | Score = Score(output[0], targets, rows[0].sampling.logprobs or 0)
        elif step.forward.argmax:
            result = Draw(output[:, -1])
        else:
            result = Draw.of(output[:, -1], rows, self._scheduler.positions(step), self._allowed(rows))
        self._results[step.index] = result
        return result.arrays()

    def done(self, step: Step, pending: Pending) -> None:
        self._in_flight -= 1
        match self._results.pop(step.index, None):
            case Draw() as draw:
                events = self._scheduler.complete(step, sampled=draw.read())
            case Score() as score:
                events = self._scheduler.complete(step, prompt_logprobs=score.read())
            case None:
                events = self._scheduler.complete(step)
        self._events += events

    def _may_start(self, step: Step) -> bool:
        goes_ahead = isinstance(step.forward, Decode) and step.forward.ahead > 0
        return self._in_flight < (self._most_with_one_ahead if goes_ahead else self._most_in_flight)

    def _refused(self, request: Request) -> Rejected | None:
        reason = self._grammars.refusal(request) if self._grammars else ""
        return Rejected(request.id, reason, retry=False) if reason else None

    def _allowed(self, rows: Sequence[Row]) -> list[Allowed | None]:
        if self._grammars is None:
            return []
        return [self._grammars.allowed(row) for row in rows]

    def _deliver(self) -> None:
        """What has happened since the last time; after publishing, for which the other ranks wait."""
        events, self._events = self._events, []
        self._source.deliver(events)

    def _listen(self) -> None:
        for command in self._source.poll():
            match command:
                case Request():
                    rejected = self._refused(command) or self._scheduler.submit(command)
                    self._events += [rejected] if rejected else []
                case Cancel():
                    finished = self._scheduler.cancel(command.id)
                    self._events += [finished] if finished else []
                case Forget():
                    self._scheduler.forget()
                    self._events.clear()  # They are for a front that has gone.
