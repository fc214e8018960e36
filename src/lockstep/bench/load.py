"""Load for a server, and what its clients see of it.

A closed loop keeps a number of clients busy; an open loop sends requests at random times, whether or not
the server keeps up. One process, one event loop.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lockstep.bench.client import Ask, Endpoint, Sample, ask
from lockstep.errors import UsageError

WORDS = """
    the and for are but not you all any can had her was one our out day get has him his how man new now
    old see two way who boy did its let put say she too use dad mom big red run sun cup dog cat car bed
    box bag map ice job key lab law leg lie lot mix net oil pay pen pie rat row sea set sit six sky son
    """.split()  # noqa: SIM905
"""Short enough to be one token each, with the space before it, in most vocabularies."""

MOST_TOKENS = 1_000_000


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens drawn from the log-uniform distribution over [low, high]."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return round(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"log-uniform {self.low}-{self.high}"

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From "64" or "16-256". Raises UsageError."""
        low, _, high = text.partition("-") if "-" in text else (text, "", text)
        numbers = [int(part) if re.fullmatch("[0-9]{1,9}", part) else 0 for part in (low, high)]
        if not 1 <= numbers[0] <= numbers[1] <= MOST_TOKENS:
            raise UsageError(
                f"{text!r} is no number of tokens: give one (64) or a range (16-256), at most {MOST_TOKENS}"
            )
        return cls(*numbers)


@dataclass(frozen=True)
class Run:
    """What came of one load; `client_cpu_s` is what this process spent on it."""

    samples: Sequence[Sample]
    wall_s: float
    client_cpu_s: float
    offered_per_s: float | None = None
    clients: int | None = None

    @property
    def good(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.error]

    @property
    def errors(self) -> list[str]:
        return [sample.error for sample in self.samples if sample.error]

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens of all clients together, from the first request to the last answer."""
        return sum(sample.completion_tokens for sample in self.good) / self.wall_s

    def percentiles(self, of: Callable[[Sample], float], percents: Iterable[float]) -> list[float]:
        return percentiles([of(sample) for sample in self.good], percents)


def percentiles(values: Sequence[float], percents: Iterable[float]) -> list[float]:
    """Percentiles with linear interpolation; NaN for no values."""
    ordered = sorted(values)
    found = []
    for percent in percents:
        if not ordered:
            found.append(float("nan"))
            continue
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        found.append(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
    return found


def asks(count: int, prompt: Lengths, output: Lengths, seed: int) -> list[Ask]:
    """Requests of random words, the same for the same seed; no two share a prefix worth caching."""
    rng = random.Random(seed)
    return [
        Ask(" " + " ".join(rng.choices(WORDS, k=prompt.draw(rng))), output.draw(rng)) for _ in range(count)
    ]


def closed_loop(endpoint: Endpoint, work: Sequence[Ask], clients: int, timeout_s: float = 300) -> Run:
    """`clients` at once, each with its next request as soon as it has its answer, until no work is left."""
    return asyncio.run(_closed_loop(endpoint, work, clients, timeout_s))


def open_loop(
    endpoint: Endpoint, work: Sequence[Ask], per_s: float, seed: int = 0, timeout_s: float = 300
) -> Run:
    """Requests at random times (Poisson), `per_s` of them on average, however many are unanswered."""
    return asyncio.run(_open_loop(endpoint, work, per_s, seed, timeout_s))


async def _closed_loop(endpoint: Endpoint, work: Sequence[Ask], clients: int, timeout_s: float) -> Run:
    left = iter(work)

    async def client() -> list[Sample]:
        return [await ask(endpoint, each, timeout_s) for each in left]

    with _Clock() as clock:
        done = await asyncio.gather(*(client() for _ in range(clients)))
    samples = [sample for one in done for sample in one]
    return Run(samples, clock.wall_s, clock.cpu_s, clients=clients)


async def _open_loop(
    endpoint: Endpoint, work: Sequence[Ask], per_s: float, seed: int, timeout_s: float
) -> Run:
    rng = random.Random(seed)
    with _Clock() as clock:
        due_s, running = time.perf_counter(), []
        for each in work:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            running.append(asyncio.create_task(ask(endpoint, each, timeout_s)))
            due_s -= math.log(1 - rng.random()) / per_s
        samples = await asyncio.gather(*running)
    return Run(samples, clock.wall_s, clock.cpu_s, offered_per_s=per_s)


class _Clock:
    def __enter__(self) -> _Clock:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self._wall_s
        self.cpu_s = time.process_time() - self._cpu_s
