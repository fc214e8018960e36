"""`lockstep bench`: what clients of a running OpenAI server see under load."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

import msgspec
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from lockstep.bench.client import Endpoint, Sample
from lockstep.bench.load import Lengths, Run, asks, closed_loop
from lockstep.cli.terminal import write
from lockstep.errors import LockstepError, UsageError

PERCENTS = (50, 95, 99)
MOST_CLIENTS, MOST_REQUESTS = 10_000, 1000


def bench(
    url: Annotated[str, Argument(help="The server, with or without /v1.")] = "http://127.0.0.1:8080",
    clients: Annotated[str, Option(help="Numbers of clients to try, by commas.")] = "1,4,8",
    requests: Annotated[int, Option(min=1, max=MOST_REQUESTS, help="Requests of each client.")] = 4,
    prompt: Annotated[str, Option(help="Words of a prompt: 32, or drawn from 16-256.")] = "32",
    output: Annotated[str, Option(help="Tokens of an answer: 64, or drawn from 16-256.")] = "64",
    model: Annotated[str | None, Option(help="The model field of the requests.")] = None,
    api_key: Annotated[str | None, Option(help="Sent as a bearer token.")] = None,
    seed: Annotated[int, Option(min=0, help="The same seed gives the same requests.")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per number of clients.")] = False,
) -> None:
    """Measure a running OpenAI server: throughput, time to the first token, time per token."""
    endpoint = Endpoint(url, model, api_key)
    table = Table("clients", "tokens/s", "TTFT p50 / p95 / p99", "time per token p50 / p95 / p99", "errors")
    prompts, outputs = Lengths.parse(prompt), Lengths.parse(output)
    for count in _numbers(clients):
        work = asks(count * requests, prompts, outputs, seed)
        run = closed_loop(endpoint, work, count)
        if not run.good:
            raise LockstepError(f"{url} answered none of {len(work)} requests: {run.errors[0]}")
        if as_json:
            write(msgspec.json.encode(_figures(count, run)).decode() + "\n")
        ttft, tpot = (_milliseconds(run, of) for of in (_ttft_s, _tpot_s))
        table.add_row(str(count), f"{run.tokens_per_s:.1f}", ttft, tpot, str(len(run.errors)))
    if not as_json:
        Console(highlight=False).print(table)


def _numbers(text: str) -> list[int]:
    found = [int(part) if re.fullmatch("[0-9]{1,9}", part) else 0 for part in text.split(",")]
    if not 1 <= min(found) <= max(found) <= MOST_CLIENTS:
        raise UsageError(f"--clients {text}: give numbers above 0, at most {MOST_CLIENTS}, like 1,4,8")
    return found


def _ttft_s(sample: Sample) -> float:
    return sample.ttft_s


def _tpot_s(sample: Sample) -> float:
    return sample.tpot_s


def _milliseconds(run: Run, of: Callable[[Sample], float]) -> str:
    values = run.percentiles(of, PERCENTS)
    return " / ".join(f"{1000 * value:.0f}" for value in values) + " ms"


def _figures(clients: int, run: Run) -> dict[str, object]:
    return {
        "clients": clients,
        "tokens_per_s": run.tokens_per_s,
        "wall_s": run.wall_s,
        "requests": len(run.samples),
        "errors": len(run.errors),
        **{f"ttft_p{p}_s": v for p, v in zip(PERCENTS, run.percentiles(_ttft_s, PERCENTS), strict=True)},
        **{f"tpot_p{p}_s": v for p, v in zip(PERCENTS, run.percentiles(_tpot_s, PERCENTS), strict=True)},
    }
