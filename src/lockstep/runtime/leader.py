"""Where rank 0 gets its steps: it makes them, publishes them, and delivers what comes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from lockstep.engine.executor import Pending
from lockstep.engine.request import Event, Request
from lockstep.engine.sampler import Draw
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.step import Step, Stop
from lockstep.runtime.channel import Leader
from lockstep.runtime.source import Source


class LedSteps:
    """Rank 0's side of the loop: commands in, steps out, events back."""

    def __init__(self, scheduler: Scheduler, source: Source, channel: Leader | None) -> None:
        """`channel` is None when rank 0 is the only rank."""
        self._scheduler = scheduler
        self._source = source
        self._channel = channel
        self._draws: dict[int, Draw] = {}
        self._in_flight = 0

    def __iter__(self) -> Iterator[Step | None]:
        while True:
            self._listen()
            step = self._scheduler.next_step()
            if step is not None:
                self._publish(step)
                self._in_flight += 1
                yield step
            elif self._in_flight:
                yield None
            elif self._source.closed:
                self._publish(Stop())
                return
            else:
                self._source.wait()

    def finish(self, step: Step, logits: mx.array) -> Sequence[mx.array]:
        """Draw a token for each row of `logits` [rows, 1, vocabulary], before they are evaluated."""
        draw = Draw(logits[:, -1], self._scheduler.rows(step))
        self._draws[step.index] = draw
        return draw.arrays()

    def done(self, step: Step, pending: Pending) -> None:
        self._in_flight -= 1
        draw = self._draws.pop(step.index, None)
        self._source.deliver(self._scheduler.complete(step, draw.read() if draw else []))

    def _listen(self) -> None:
        for command in self._source.poll():
            event: Event | None
            if isinstance(command, Request):
                event = self._scheduler.submit(command)
            else:
                event = self._scheduler.cancel(command.id)
            if event is not None:
                self._source.deliver([event])

    def _publish(self, message: Step | Stop) -> None:
        if self._channel is not None:
            self._channel.publish(message)
