"""A pipeline of 1 to 16 ranks on any machine: stages that sleep instead of computing.

Scheduler, control channel and step loop are the product's; only the device is not. A stage waits for its
input on a socket from the stage before, sleeps its part of the model's time, and sends on. The model takes
the same time on any number of ranks, and each rank brings the same number of clients: ideally throughput
grows with the ranks, and every stage works all the time.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from common.processes import BenchmarkError
from common.report import Report, parser, publish
from lockstep.engine.limits import Limits
from lockstep.engine.request import Event, Finished, Request, Sampled, Token
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.step import Decode, Step
from lockstep.runtime.channel import Follower, KeyPair, Leader
from lockstep.runtime.follower import FollowedSteps
from lockstep.runtime.leader import LedSteps
from lockstep.runtime.loop import run
from lockstep.runtime.messages import Ready
from lockstep.runtime.progress import Progress

ROWS = 4
"""Clients per rank, and so rows in each micro-batch."""
HIDDEN_BYTES = 3072
"""What a row's hidden state would take on the wire."""
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Point:
    """One number of ranks. Seconds per step of one stage: as it should be, and as rank 0 saw it."""

    ranks: int
    tokens_per_s: float
    ideal_tokens_per_s: float
    bubble: float
    stage_s: float
    step_s: float

    @property
    def overhead_s(self) -> float:
        return self.step_s - self.stage_s


class Done:
    """A step that the sleeping device works on."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self.finish = self._finished.set

    def wait(self) -> None:
        if not self._finished.wait(TIMEOUT_S):
            raise BenchmarkError("a stage does not get its input")


class SleepingExecutor:
    """Takes the place of the executor: one device thread, first in, first out, like a stream of mlx."""

    def __init__(self, source: socket.socket | None, sink: socket.socket | None, stage_s: float) -> None:
        self._source, self._sink, self._stage_s = source, sink, stage_s
        self._queue: queue.SimpleQueue[tuple[int, Done]] = queue.SimpleQueue()
        self.spans: list[tuple[float, float]] = []
        """When the device worked: from, until."""
        threading.Thread(target=self._work, daemon=True).start()

    def start(self, step: Step) -> Done:
        done = Done()
        self._queue.put((step.forward.rows if step.forward else 0, done))
        return done

    def _work(self) -> None:
        while True:
            rows, done = self._queue.get()
            if rows:
                self._compute(rows * HIDDEN_BYTES)
            done.finish()

    def _compute(self, size: int) -> None:
        if self._source is not None:
            left = size
            while left:
                left -= len(self._source.recv(left))
        began_s = time.perf_counter()
        time.sleep(self._stage_s)
        self.spans.append((began_s, time.perf_counter()))
        if self._sink is not None:
            self._sink.sendall(bytes(size))


class SleepingSteps(LedSteps):
    """Rank 0's steps, whose results need no logits: every token is the same."""

    def done(self, step: Step, pending: Any) -> None:
        self._in_flight -= 1
        rows = step.forward.rows if isinstance(step.forward, Decode) else 0
        self._source.deliver(self._scheduler.complete(step, sampled=[Sampled(1)] * rows))


class Clients:
    """Requests that are all there from the beginning, and the times of their tokens."""

    def __init__(self, count: int, tokens: int) -> None:
        self._requests = [Request(id=str(i), prompt=[1], max_tokens=tokens) for i in range(count)]
        self._left = count
        self.stamps: list[float] = []

    @property
    def closed(self) -> bool:
        return self._left == 0

    def poll(self) -> list[Request]:
        requests, self._requests = self._requests, []
        return requests

    def wait(self) -> None:
        raise AssertionError("the engine is idle, but there are requests")

    def deliver(self, events: Sequence[Event]) -> None:
        now_s = time.perf_counter()
        self.stamps += [now_s for event in events if isinstance(event, Token)]
        self._left -= sum(isinstance(event, Finished) for event in events)


def main() -> int:
    options = parser(__doc__, minutes=4)
    options.add_argument("--ranks", help="such as 1,2,4")
    options.add_argument("--model-ms", type=float, default=80, help="what one step takes on one rank")
    chosen = options.parse_args()
    began_s = time.monotonic()
    sizes = (1, 2, 4) if chosen.quick else (1, 2, 3, 4, 6, 8, 12, 16)
    if chosen.ranks:
        sizes = tuple(map(int, chosen.ranks.split(",")))
    run_s, rounds = (2.0, 1) if chosen.quick else (6.0, 3)
    points = [[measure(size, chosen.model_ms / 1e3, run_s) for size in sizes] for _ in range(rounds)]
    return publish(make_report(list(zip(*points, strict=True)), chosen.model_ms), chosen, began_s)


def measure(size: int, model_s: float, run_s: float) -> Point:
    """A pipeline of `size` ranks, each a process, for about `run_s` seconds."""
    context = multiprocessing.get_context("fork")
    keys = [KeyPair.make() for _ in range(size)]
    links = [socket.socketpair() for _ in range(size - 1)]
    told = [context.Pipe() for _ in range(size)]
    tokens = max(20, round(run_s / model_s))
    ranks = []
    for rank in range(size):
        source = links[rank][1] if rank < size - 1 else None
        sink = links[rank - 1][0] if rank > 0 else None
        arguments = (rank, keys, told[rank][1], source, sink, model_s / size, tokens)
        ranks.append(context.Process(target=be_rank, args=arguments, daemon=True))
    for process in ranks:
        process.start()
    try:
        ports = hear(told[0][0], ranks)
        for parent, _ in told[1:]:
            parent.send(ports)
        stamps = hear(told[0][0], ranks)
        spans = [hear(parent, ranks) for parent, _ in told]
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return summarise(size, model_s, stamps, spans)


def hear(pipe: Connection, ranks: Sequence[Any] = ()) -> Any:
    """What a rank says. Raises BenchmarkError when one of `ranks` has failed, or nothing comes."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not pipe.poll(0.2):
        if any(process.exitcode for process in ranks) or time.monotonic() > deadline_s:
            raise BenchmarkError(f"a rank failed, or said nothing for {TIMEOUT_S:g} s")
    return pipe.recv()


def be_rank(
    rank: int,
    keys: Sequence[KeyPair],
    pipe: Connection,
    source: socket.socket | None,
    sink: socket.socket | None,
    stage_s: float,
    tokens: int,
) -> None:
    """One process of the pipeline, from the control channel to the report of what its device did."""
    size = len(keys)
    executor: Any = SleepingExecutor(source, sink, stage_s)
    if rank == 0:
        leader = Leader("127.0.0.1", keys[0])
        leader.watch.close()
        leader.admit(key.public for key in keys[1:])
        pipe.send((leader.port, leader.watch_port))
        leader.gather(Ready, size, TIMEOUT_S, "join")
        clients = Clients(ROWS * size, tokens)
        limits = Limits(lanes=size, kv_tokens=10**6, max_context=10**4)
        run(executor, SleepingSteps(Scheduler(limits), clients, leader), Progress(TIMEOUT_S))
        leader.close()
        pipe.send(clients.stamps)
    else:
        follower = Follower(rank, "127.0.0.1", hear(pipe), keys[0].public, keys[rank])
        follower.watch.close()
        follower.report(Ready(rank=rank, weight_bytes=0, peak_memory_bytes=0, kv_tokens=0))
        run(executor, FollowedSteps(follower), Progress(TIMEOUT_S))
    pipe.send(executor.spans)
    os._exit(0)


def summarise(
    size: int, model_s: float, stamps: Sequence[float], spans: Sequence[Sequence[tuple[float, float]]]
) -> Point:
    """Of the middle of the run: without filling and emptying the pipeline."""
    first, last = stamps[0], stamps[-1]
    begin, end = first + 0.15 * (last - first), first + 0.85 * (last - first)
    counted = sum(begin <= stamp < end for stamp in stamps)
    busy = [sum(max(0.0, min(b, end) - max(a, begin)) for a, b in own) for own in spans]
    starts = [a for a, _ in spans[0] if begin <= a < end]
    return Point(
        ranks=size,
        tokens_per_s=counted / (end - begin),
        ideal_tokens_per_s=ROWS * size / model_s,
        bubble=1 - statistics.mean(busy) / (end - begin),
        stage_s=model_s / size,
        step_s=(starts[-1] - starts[0]) / (len(starts) - 1),
    )


def make_report(points: Sequence[Sequence[Point]], model_ms: float) -> Report:
    title = f"Stages that sleep: a model of {model_ms:g} ms, {ROWS} clients per rank"
    columns = ["ranks", "tokens/s", "ideal", "of ideal", "bubble", "stage", "step overhead"]
    report = Report("scale", title, columns)
    table = [middle(rounds) for rounds in points]
    for p in table:
        rates = [f"{p.tokens_per_s:.0f}", f"{p.ideal_tokens_per_s:.0f}"]
        rates.append(f"{100 * p.tokens_per_s / p.ideal_tokens_per_s:.0f}%")
        times = [f"{1e3 * p.stage_s:.1f} ms", f"{1e3 * p.overhead_s:.2f} ms"]
        report.rows.append([str(p.ranks), *rates, f"{100 * p.bubble:.0f}%", *times])
    report.notes.append(
        "Bubble: the part of the time in which a stage's device has nothing to do, averaged over the stages. "
        "Step overhead: what a step of rank 0 takes beyond its stage's time; all ranks share the cores."
    )
    report.data["points"] = [[vars(p) for p in rounds] for rounds in points]
    report.plot = lambda figure: draw(figure, table)
    return report


def middle(rounds: Sequence[Point]) -> Point:
    """The round with the median throughput."""
    return sorted(rounds, key=lambda p: p.tokens_per_s)[len(rounds) // 2]


def draw(figure: Any, table: Sequence[Point]) -> None:
    left, right = figure.subplots(1, 2)
    ranks = [p.ranks for p in table]
    left.plot(ranks, [p.ideal_tokens_per_s for p in table], "k:", label="ideal")
    left.plot(ranks, [p.tokens_per_s for p in table], "o-", label="measured")
    left.set_ylabel("tokens/s")
    left.set_xlabel("ranks")
    left.legend()
    right.plot(ranks, [100 * p.bubble for p in table], "s-", color="tab:red", label="bubble, %")
    right.plot(ranks, [1e3 * p.overhead_s for p in table], "o-", label="step overhead, ms")
    right.set_xlabel("ranks")
    right.set_ylim(bottom=0)
    right.legend()


if __name__ == "__main__":
    sys.exit(main())
