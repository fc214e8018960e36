"""The same load on Lockstep and on its peers, side by side.

Same weights, same dtype (float32), same BLAS with one thread per rank, same cores (rank r on core r, what
else a server needs on the core of rank 0), interleaved: every round measures every server once, and ratios
are medians of the rounds' own ratios.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import models
from common.engine import Loop
from common.processes import BenchmarkError, Program, pinned_python
from common.report import Bar, Report, parser, publish, ratio
from common.servers import PROGRAMS, Contestant, Server, mlx_lm_server, ours, ours_under_mlx_launch
from lockstep.bench.load import Lengths, Run, asks, closed_loop

UNSEEN = 1000
"""Added to a round's number for prompts that no other load of it has put into a prefix cache."""
LONG_PROMPT = 2048
LONG = ("one", "pipe", "pipe_mpi")
LIMIT = (
    "twice what 1 rank serves to half of the clients. Every micro-batch reads all weights, so where a row "
    "costs little beside them, a pipeline cannot serve the same clients much faster than 1 rank"
)


@dataclass(frozen=True)
class Load:
    """So many clients at once, each with one answer of so many tokens."""

    clients: int
    prompt: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.clients} clients, {self.prompt} prompt and {self.tokens} answer tokens each"


@dataclass
class Line:
    """The rounds of one contestant."""

    label: str
    differs: str = ""
    rounds: list[float] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    start_up_s: float = 0.0
    trouble: str = ""


def main() -> int:
    options = parser(__doc__, minutes=9)
    options.add_argument("--only", help="such as one,pipe,peer_one,bare (see contestants())")
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--long", action="store_true", help="long prompts, on 1 rank and in pipelines only")
    options.add_argument("--tokens", type=int, help="tokens per answer (64; quick 24)")
    chosen = options.parse_args()
    began_s = time.monotonic()
    prompt = LONG_PROMPT if chosen.long else 32
    load = Load(chosen.clients, prompt, chosen.tokens or (24 if chosen.quick else 64))
    shape = models.QUICK if chosen.quick else models.FULL
    model = models.folder(shape)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        python = pinned_python(Path(folder))
        even = ["--split", f"{shape.layers // 2},{shape.layers // 2}"] if chosen.long else []
        wanted = contestants(model, python, chosen.quick, even)
        only = chosen.only.split(",") if chosen.only else LONG if chosen.long else [*wanted, "bare"]
        wanted = {key: contestant for key, contestant in wanted.items() if key in only}
        lines = {key: Line(contestant.label, contestant.differs) for key, contestant in wanted.items()}
        servers = start(wanted, lines, stack)
        loop = None
        if "bare" in only:
            argv = [str(python), str(PROGRAMS / "bare_loop.py"), str(model)]
            loop = Loop("bare loop, 1 rank", Program(argv, stdin=True))
            stack.enter_context(loop)
            loop.wait_until_ready()
            lines["bare"] = Line(loop.label, f"no server: mlx-lm's model and one loop ({loop.blas})")
        deadline_s = began_s + (1.0 if chosen.quick else 60 * chosen.minutes - 20)
        compete(servers, loop, lines, load, deadline_s, limited=not chosen.long)
    report = make_report("compare-long" if chosen.long else "compare", lines, load, model.name)
    return publish(report, chosen, began_s)


def contestants(model: Path, python: Path, quick: bool, split: Sequence[str] = ()) -> dict[str, Contestant]:
    """Ours and theirs; the quick run leaves out what only repeats a form over another backend.

    `split` are options of our pipelines: prompts need no head, so half of the layers is half of their time.
    """
    few = {
        "one": ours(model, python, 1),
        "pipe": ours(model, python, 2, "ring", options=split),
        "peer_one": mlx_lm_server(model, python, 1),
        "peer_pipe": mlx_lm_server(model, python, 2, "ring", "pipeline"),
    }
    if quick:
        return few
    return {
        **few,
        "pipe_mpi": ours(model, python, 2, "mpi", options=split),
        "pipe_mlx_launch": ours_under_mlx_launch(model, python, 2),
        "peer_pipe_mpi": mlx_lm_server(model, python, 2, "mpi", "pipeline"),
        "tensor_mpi": ours(model, python, 2, "mpi", "tensor"),
        "tensor_ring": ours(model, python, 2, "ring", "tensor"),
        "peer_tensor_mpi": mlx_lm_server(model, python, 2, "mpi", "tensor"),
        "peer_tensor_ring": mlx_lm_server(model, python, 2, "ring", "tensor"),
    }


def start(wanted: dict[str, Contestant], lines: dict[str, Line], stack: ExitStack) -> dict[str, Server]:
    """Start all servers, one after the other; those that do not come up are told, and left out."""
    servers = {}
    for key, contestant in wanted.items():
        server = stack.enter_context(Server(contestant))
        try:
            server.wait_until_ready()
        except BenchmarkError as error:
            lines[key].trouble = str(error)
            server.stop()
            print(error, file=sys.stderr)
            continue
        server.answer(8)
        server.quieten()
        lines[key].start_up_s = server.start_up_s
        servers[key] = server
    return servers


def compete(
    servers: dict[str, Server],
    loop: Loop | None,
    lines: dict[str, Line],
    load: Load,
    deadline_s: float,
    limited: bool,
) -> None:
    """Rounds until the time is up, at least one; each begins with another contestant.

    `limited`: answers take the time, so there is a limit of a pipeline to be measured.
    """
    number, took_s = 0, 0.0
    while number == 0 or time.monotonic() + took_s < deadline_s:
        began_s = time.monotonic()
        keys = list(servers)
        first = number % max(len(keys), 1)
        for key in keys[first:] + keys[:first]:
            try:
                measure(servers[key], lines[key], load, number)
                if key == "one" and limited:
                    half = Line("1 rank, half of the clients")
                    fewer = replace(load, clients=max(load.clients // 2, 1))
                    measure(servers[key], half, fewer, number + UNSEEN)
                    limit = lines.setdefault("limit", Line("limit of a pipeline of 2 ranks", LIMIT))
                    limit.rounds.append(2 * half.rounds[0])
            except BenchmarkError as error:
                lines[key].trouble = str(error)
                servers.pop(key).stop()
                print(error, file=sys.stderr)
        if loop is not None:
            timing = loop.generate(load.clients, load.prompt, load.tokens)
            lines["bare"].rounds.append(load.clients * load.tokens / timing.wall_s)
        number, took_s = number + 1, time.monotonic() - began_s


def measure(server: Server, line: Line, load: Load, number: int) -> None:
    server.wake()
    prompt, tokens = (Lengths(n, n) for n in (load.prompt, load.tokens))
    work = asks(load.clients, prompt, tokens, seed=number + 1)
    run = closed_loop(server.contestant.endpoint, work, load.clients)
    server.quieten()
    if run.errors:
        raise BenchmarkError(f"{line.label}: {run.errors[0]}\n{server.tail()}")
    assert all(sample.completion_tokens == load.tokens for sample in run.samples), (
        f"{line.label}: other lengths"
    )
    line.rounds.append(run.tokens_per_s)
    line.runs.append(run)


def make_report(name: str, lines: dict[str, Line], load: Load, model: str) -> Report:
    rounds = max((len(line.rounds) for line in lines.values()), default=0)
    title = f"{load}; {model}, {rounds} rounds"
    columns = ["server", "tokens/s", "best", "TTFT p50", "TTFT p95", "TPOT p50", "client CPU", "start-up"]
    report = Report(name, title, columns)
    for line in lines.values():
        report.rows.append(row(line))
        if line.differs:
            report.notes.append(f"{line.label}: {line.differs}.")
        if line.trouble:
            report.notes.append(f"{line.label} failed: {line.trouble.splitlines()[0]}")
    report.bars = bars(lines)
    report.data["rounds"] = {line.label: line.rounds for line in lines.values()}
    report.data["start_up_s"] = {line.label: line.start_up_s for line in lines.values() if line.start_up_s}
    report.data["load"] = vars(load)
    report.plot = lambda figure: draw(figure, lines, load)
    return report


def row(line: Line) -> list[str]:
    if line.trouble:
        return [line.label, "failed", *[""] * 6]
    cells = [line.label, f"{statistics.median(line.rounds):.1f}", f"{max(line.rounds):.1f}"]
    if not line.runs:
        return [*cells, *[""] * 5]
    ttft = [run.percentiles(lambda s: s.ttft_s, [50, 95]) for run in line.runs]
    tpot = [run.percentiles(lambda s: s.tpot_s, [50])[0] for run in line.runs]
    cpu = [run.client_cpu_s / run.wall_s for run in line.runs]
    cells += [f"{1e3 * statistics.median(t[i] for t in ttft):.0f} ms" for i in (0, 1)]
    return [
        *cells,
        f"{1e3 * statistics.median(tpot):.1f} ms",
        f"{100 * statistics.median(cpu):.1f}%",
        f"{line.start_up_s:.1f} s",
    ]


def bars(lines: dict[str, Line]) -> list[Bar]:
    """Issue 4's, of throughput, for those that took part."""

    def bar(what: str, over: str, under: str, limit: float) -> list[Bar]:
        if over not in lines or under not in lines:
            return []
        failed = [key for key in (over, under) if lines[key].trouble]
        value = float("nan") if failed else ratio(lines[over].rounds, lines[under].rounds)
        return [Bar(what, value, limit, why_not=f"without {', '.join(failed)}" if failed else "")]

    return [
        *bar("pipeline of 2 ranks over 1 rank (ring)", "pipe", "one", 1.8),
        *bar("pipeline of 2 ranks over 1 rank (mpi)", "pipe_mpi", "one", 1.8),
        *bar("pipeline of 2 ranks over mlx_lm.server --pipeline (ring)", "pipe", "peer_pipe", 1.7),
        *bar("pipeline of 2 ranks over mlx_lm.server --pipeline (mpi)", "pipe_mpi", "peer_pipe_mpi", 1.7),
        *bar("tensor of 2 ranks over mlx_lm.server tensor (mpi)", "tensor_mpi", "peer_tensor_mpi", 1.5),
        *bar("tensor of 2 ranks over 1 rank (mpi)", "tensor_mpi", "one", 1.75),
        *bar("tensor of 2 ranks over 1 rank (ring)", "tensor_ring", "one", 1.6),
        *bar("1 rank over mlx_lm.server in one process", "one", "peer_one", 1.25),
        *bar("1 rank over a bare batched decode loop", "one", "bare", 0.92),
    ]


def draw(figure: Any, lines: dict[str, Line], load: Load) -> None:
    shown = [line for line in reversed(lines.values()) if not line.trouble]
    axes = figure.subplots()
    colours = ["tab:blue" if line.label.startswith("lockstep") else "tab:gray" for line in shown]
    axes.barh(
        [line.label for line in shown], [statistics.median(line.rounds) for line in shown], color=colours
    )
    for place, line in enumerate(shown):
        axes.plot(line.rounds, [place] * len(line.rounds), "k.", markersize=4)
    axes.set_xlabel(f"tokens/s of {load.clients} clients (dots: rounds)")


if __name__ == "__main__":
    sys.exit(main())
