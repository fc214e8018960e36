"""Faults on purpose, to show that a run survives them. Off unless LOCKSTEP_FAULT is set.

    LOCKSTEP_FAULT="rank=1,step=20,action=freeze"

rank     the rank that fails
step     from which step on (counted from 0); not used while loading
action   raise       an uncaught exception
         exit0       end with status 0, as if all were well
         exit3       end with status 3
         kill        SIGKILL to itself, as the kernel does when memory runs out
         stop        SIGSTOP to itself
         freeze      the main thread does nothing any more
         sleep:S     the main thread does nothing for S seconds
         wrong-step  execute another step than rank 0 sent
         fail-load   an error while loading
         freeze-load the main thread does nothing any more while loading
         oom         ask for more memory than there is
attempt  which start of the ranks fails: 0 (default) is the first, "all" every one

Several faults are separated by semicolons.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from lockstep.engine.step import Decode, Forward, Prefill, Step
from lockstep.errors import LockstepError, UsageError
from lockstep.runtime.environment import ATTEMPT

VARIABLE = "LOCKSTEP_FAULT"

FOR_EVER_S = 1e6


class StepError(Exception):
    """The exception of the action `raise`: not one of ours, so nothing handles it."""


@dataclass(frozen=True)
class Fault:
    """One fault of this rank."""

    action: str
    step: int = 0
    seconds: float = 0.0

    def while_loading(self) -> None:
        """Raises LockstepError if loading is what shall fail."""
        if self.action == "fail-load":
            raise LockstepError(f"{VARIABLE} makes loading fail")
        if self.action == "freeze-load":
            time.sleep(FOR_EVER_S)

    def strike(self, step: Step) -> Step:
        """What is executed in place of `step`, if anything still is."""
        if self.action == "wrong-step" and step.index >= self.step:
            return altered(step)
        if step.index == self.step and self.action in _ACTIONS:
            _ACTIONS[self.action](self)
        return step


def read(rank: int, env: Mapping[str, str]) -> Fault | None:
    """The fault that `env` asks of this rank in this attempt. Raises UsageError for one that there is not."""
    attempt = env.get(ATTEMPT, "0")
    wanted = [_parse(text) for text in env.get(VARIABLE, "").split(";") if text.strip()]
    return next((fault for fault, who, when in wanted if who == rank and when in ("all", attempt)), None)


def _parse(text: str) -> tuple[Fault, int, str]:
    """One fault, the rank that it strikes, and in which attempt."""
    try:
        fields = dict(part.strip().split("=", 1) for part in text.split(","))
        action, _, seconds = fields.pop("action").partition(":")
        rank, step = int(fields.pop("rank")), int(fields.pop("step", "0"))
        attempt = fields.pop("attempt", "0")
        fault = Fault(action, step, float(seconds or 0))
    except (KeyError, ValueError) as error:
        raise UsageError(f'{VARIABLE}={text}: write "rank=1,step=20,action=raise"') from error
    if fields or action not in {*_ACTIONS, "wrong-step", *_LOADING}:
        raise UsageError(f"{VARIABLE}={text}: no such {' or '.join(fields) or 'action'}")
    return fault, rank, attempt


def injected(steps: Iterable[Step | None], fault: Fault | None) -> Iterator[Step | None]:
    """`steps` with the fault among them."""
    for step in steps:
        yield fault.strike(step) if fault and step else step


def altered(step: Step) -> Step:
    """Another step of the same form: its first token is another one."""
    forward = step.forward
    changed: Forward
    match forward:
        case Decode(tokens=[first, *others]):
            changed = msgspec.structs.replace(forward, tokens=[first ^ 1, *others])
        case Decode(ahead=rows) if rows:
            changed = msgspec.structs.replace(forward, tokens=[0] * rows, ahead=0)
        case Prefill(tokens=[[first, *rest], *others]):
            changed = msgspec.structs.replace(forward, tokens=[[first ^ 1, *rest], *others])
        case _:
            return step
    return msgspec.structs.replace(step, forward=changed)


def _raise(fault: Fault) -> None:
    raise StepError(f"{VARIABLE} raises in step {fault.step}")


def _exhaust_memory(_: Fault) -> None:
    import mlx.core as mx

    with open("/proc/self/statm") as file:  # noqa: PTH123
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2**28, resource.RLIM_INFINITY))
    hoard = []
    while True:
        hoard.append(mx.zeros((2**26,)))
        mx.eval(hoard[-1])


_LOADING = ("fail-load", "freeze-load")
_ACTIONS: Mapping[str, Callable[[Fault], object]] = {
    "raise": _raise,
    "exit0": lambda _: os._exit(0),
    "exit3": lambda _: os._exit(3),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "freeze": lambda _: time.sleep(FOR_EVER_S),
    "sleep": lambda fault: time.sleep(fault.seconds),
    "oom": _exhaust_memory,
}
