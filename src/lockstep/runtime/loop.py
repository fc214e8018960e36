"""The loop that every rank runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from lockstep.engine.executor import Executor, Pending
from lockstep.engine.step import Step
from lockstep.runtime.faults import Fault, injected
from lockstep.runtime.progress import Progress


class Steps(Protocol):
    """Where steps come from: rank 0 makes them, the other ranks are told."""

    def __iter__(self) -> Iterator[Step | None]:
        """The next step, or None for "finish the oldest step in flight first"."""

    def done(self, step: Step, pending: Pending) -> None:
        """The device has finished this step."""


def run(executor: Executor, steps: Steps, progress: Progress, fault: Fault | None = None) -> None:
    """Execute steps until there are no more. The same on every rank.

    A started step is in flight: the device works on it while the next one is read and its graph built.
    `progress` is told of every step; `fault` is a failure on purpose.
    """
    in_flight: deque[tuple[Step, Pending]] = deque()
    for step in injected(steps, fault):
        if step is not None:
            progress.began(step)
            in_flight.append((step, executor.start(step)))
        else:
            oldest, pending = in_flight.popleft()
            pending.wait()
            progress.finished(oldest)
            steps.done(oldest, pending)
