"""Throughput and latency of a server against the number of its clients, and against the rate of requests.

Starts `lockstep serve` with 1 and 2 ranks, or measures any running server of OpenAI's API (--url). Prompt and
answer lengths are drawn from stated log-uniform distributions. In the closed loop each client sends its next
request when it has its answer; in the open loop requests come at random times (Poisson), at parts of the rate
that the closed loop has reached.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import models
from common.processes import BenchmarkError, pinned_python
from common.report import Report, parser, publish
from common.servers import Server, ours
from lockstep.bench.client import Endpoint
from lockstep.bench.load import Lengths, Run, asks, closed_loop, open_loop

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
RATES = (0.5, 0.8)
"""Parts of the best closed-loop rate that the open loop offers."""


@dataclass(frozen=True)
class Load:
    """What is asked, and for how long."""

    clients: Sequence[int]
    prompt: Lengths
    output: Lengths
    requests: int
    """At least so many in each run of the closed loop, and two for each of up to 16 clients."""
    run_s: float
    """How long a run of the open loop should take."""

    def requests_for(self, clients: int) -> int:
        return max(self.requests, clients + min(clients, 16))


@dataclass(frozen=True)
class Measured:
    """The runs of one server."""

    label: str
    closed: Sequence[Run]
    opened: Sequence[Run]


def main() -> int:
    options = parser(__doc__, minutes=9)
    options.add_argument("--url", help="measure this server instead of starting ours")
    options.add_argument("--model", help="the model field of the requests, for --url")
    options.add_argument("--api-key", help="for --url")
    options.add_argument("--ranks", help="of our server; 1,2 by default", default="1,2")
    options.add_argument("--backend", default="ring")
    options.add_argument("--parallel", default="pipeline", choices=("pipeline", "tensor"))
    options.add_argument("--clients", help="such as 1,8,64")
    options.add_argument("--prompt", type=Lengths.parse, help="prompt tokens, such as 16-256")
    options.add_argument("--answer", type=Lengths.parse, help="answer tokens, such as 16-128")
    chosen = options.parse_args()
    began_s = time.monotonic()
    load = make_load(chosen)
    measured = list(measure_all(chosen, load))
    report = make_report(measured, load, chosen.url or "our server")
    return publish(report, chosen, began_s)


def make_load(chosen: argparse.Namespace) -> Load:
    clients = (1, 4, 8) if chosen.quick else CLIENTS
    if chosen.clients:
        clients = tuple(map(int, chosen.clients.split(",")))
    return Load(
        clients=clients,
        prompt=chosen.prompt or (Lengths(8, 64) if chosen.quick else Lengths(16, 256)),
        output=chosen.answer or (Lengths(8, 16) if chosen.quick else Lengths(16, 64)),
        requests=4 if chosen.quick else 8,
        run_s=4 if chosen.quick else 25,
    )


def measure_all(chosen: argparse.Namespace, load: Load) -> list[Measured]:
    if chosen.url:
        return [
            measure(chosen.url, Endpoint(chosen.url, chosen.model, chosen.api_key), load, 60 * chosen.minutes)
        ]
    model = models.folder(models.QUICK if chosen.quick else models.FULL)
    ranks = list(map(int, chosen.ranks.split(",")))
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        python = pinned_python(Path(folder))
        for number in ranks[-1:] if chosen.quick else ranks:
            contestant = ours(model, python, number, chosen.backend, chosen.parallel)
            with ExitStack() as stack:
                server = stack.enter_context(Server(contestant))
                server.wait_until_ready()
                limit_s = 60 * chosen.minutes / len(ranks) - 20
                measured.append(measure(contestant.label, contestant.endpoint, load, limit_s))
    return measured


def measure(label: str, endpoint: Endpoint, load: Load, limit_s: float) -> Measured:
    """The closed loop, and the open loop before the last number of clients, which takes longest.

    Ends early when the time is up.
    """
    began_s = time.monotonic()

    def closed_run(clients: int) -> Run:
        work = asks(load.requests_for(clients), load.prompt, load.output, seed=clients)
        return check(label, closed_loop(endpoint, work, clients))

    def time_is_left() -> bool:
        return time.monotonic() - began_s < 0.8 * limit_s

    check(label, closed_loop(endpoint, asks(2, load.prompt, Lengths(4, 4), seed=99), 1))
    first, *others = load.clients
    closed = [closed_run(first), *(closed_run(clients) for clients in others[:-1] if time_is_left())]
    best_per_s = max(len(run.good) / run.wall_s for run in closed)
    opened = []
    for part in RATES:
        if time_is_left():
            per_s = part * best_per_s
            work = asks(max(4, round(per_s * load.run_s)), load.prompt, load.output, seed=round(1000 * part))
            opened.append(check(label, open_loop(endpoint, work, per_s)))
    closed += [closed_run(clients) for clients in others[-1:] if time_is_left()]
    return Measured(label, closed, opened)


def check(label: str, run: Run) -> Run:
    if run.errors:
        raise BenchmarkError(f"{label}: {len(run.errors)} of {len(run.samples)} failed: {run.errors[0]}")
    return run


def make_report(measured: Sequence[Measured], load: Load, what: str) -> Report:
    title = f"Load on {what}: prompts {load.prompt}, answers {load.output} tokens"
    columns = ["server", "load", "tokens/s", "requests/s", "TTFT p50", "p95", "TPOT p50", "p95", "client CPU"]
    report = Report("serve", title, columns)
    report.data["runs"] = []
    for one in measured:
        for run in [*one.closed, *one.opened]:
            figures = describe(run)
            report.rows.append(row(one.label, run, figures))
            report.data["runs"].append({"server": one.label, **figures})
    report.plot = lambda figure: draw(figure, measured)
    return report


def describe(run: Run) -> dict[str, float | None]:
    ttft = run.percentiles(lambda sample: sample.ttft_s, [50, 95, 99])
    tpot = run.percentiles(lambda sample: sample.tpot_s, [50, 95, 99])
    return {
        "clients": run.clients,
        "offered_per_s": run.offered_per_s,
        "requests": len(run.samples),
        "tokens_per_s": run.tokens_per_s,
        "requests_per_s": len(run.good) / run.wall_s,
        **{f"ttft_p{p}_s": value for p, value in zip((50, 95, 99), ttft, strict=True)},
        **{f"tpot_p{p}_s": value for p, value in zip((50, 95, 99), tpot, strict=True)},
        "client_cpu": run.client_cpu_s / run.wall_s,
    }


def row(label: str, run: Run, figures: dict[str, Any]) -> list[str]:
    load = f"{run.clients} clients" if run.clients else f"{run.offered_per_s:.2f} requests/s"
    times = [f"{1e3 * figures[f'{kind}_p{p}_s']:.0f} ms" for kind in ("ttft", "tpot") for p in (50, 95)]
    rates = [f"{figures['tokens_per_s']:.1f}", f"{figures['requests_per_s']:.2f}"]
    return [label, load, *rates, *times, f"{100 * figures['client_cpu']:.1f}%"]


def draw(figure: Any, measured: Sequence[Measured]) -> None:
    left, right = figure.subplots(1, 2)
    for one in measured:
        clients = [run.clients for run in one.closed]
        left.plot(clients, [run.tokens_per_s for run in one.closed], "o-", label=one.label)
        ttft = [run.percentiles(lambda s: s.ttft_s, [50])[0] for run in one.closed]
        tpot = [run.percentiles(lambda s: s.tpot_s, [50])[0] for run in one.closed]
        right.plot(clients, ttft, "o-", label=f"TTFT p50, {one.label}")
        right.plot(clients, tpot, "s--", label=f"TPOT p50, {one.label}")
    left.set_ylabel("tokens/s, all clients together")
    left.set_ylim(bottom=0)
    right.set_ylabel("seconds")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("clients")
        axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main())
