"""Latency and bandwidth between two ranks: mlx's backends, their limits, and the round trip of a step.

Two ranks on this machine, each on a core of its own. Times are medians: of many calls in a round, then of the
rounds, which are interleaved. `send/recv` is half a ping-pong. The limit of ring is a socket, that of mpi is
mpi4py; a collective over ring is held against sending the same number of bytes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import models
from common.engine import Engine
from common.processes import Program, environment, free_port, pinned_python
from common.report import Report, parser, publish
from common.servers import PROGRAMS, start_ranks

SIZES = (4, 4096, 65536, 1 << 20, 16 << 20)
LAUNCHED = {"ring": "ring", "tcp": "ring", "zmq": "ring", "mpi": "mpi", "mpi4py": "mpi"}
"""What is measured, and under which of the launcher's backends."""
LIMITS = {"ring": "tcp", "mpi": "mpi4py"}

Times = dict[tuple[str, str, int], list[float]]
"""Seconds of each round by kind, operation and size."""


def main() -> int:
    options = parser(__doc__, minutes=4)
    chosen = options.parse_args()
    began_s = time.monotonic()
    sizes = SIZES[1:4] if chosen.quick else SIZES
    times: Times = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        python = pinned_python(Path(folder))
        deadline_s = began_s + (1 if chosen.quick else 60 * chosen.minutes - 40)
        took_s, rounds = 0.0, 0
        while rounds == 0 or time.monotonic() + took_s < deadline_s:
            round_s = time.monotonic()
            for kind in LAUNCHED:
                measure(kind, python, sizes, 0.1 if chosen.quick else 0.5, times)
            took_s, rounds = time.monotonic() - round_s, rounds + 1
        step_s = step_times(python, Path(folder), chosen.quick)
    return publish(make_report(times, sizes, step_s), chosen, began_s)


def measure(kind: str, python: Path, sizes: Sequence[int], budget_s: float, times: Times) -> None:
    arguments = [kind, str(free_port()), str(budget_s), *map(str, sizes)]
    argv = start_ranks(python, LAUNCHED[kind], 2, [str(PROGRAMS / "comm_rank.py"), *arguments])
    with Program(argv, environment(), stdin=True) as program:
        found = json.loads(program.listen(120))
    for operation, by_size in found.items():
        for size, seconds in by_size.items():
            times[kind, operation, int(size)].append(seconds)


def step_times(python: Path, folder: Path, quick: bool) -> dict[str, float]:
    """Seconds per decode step of a model whose computation takes next to nothing."""
    model = models.folder(models.STEP)
    found = {}
    for backend, ranks in (("ring", 1), ("ring", 2)) if quick else (("ring", 1), ("ring", 2), ("mpi", 2)):
        label = "1 rank" if ranks == 1 else f"{ranks} ranks, {backend}"
        serve = ["-m", "lockstep", "serve", "--model", str(model)]
        argv = start_ranks(python, backend, ranks, serve)
        with Engine(label, folder, lambda env, argv=argv: Program(argv, {**environment(), **env})) as engine:
            engine.wait_until_ready()
            engine.wake()
            runs = [engine.generate(1, 4, 50 if quick else 200) for _ in range(2 if quick else 5)]
            found[label] = statistics.median(run.token_s for run in runs)
    return found


def make_report(times: Times, sizes: Sequence[int], step_s: Mapping[str, float]) -> Report:
    rounds = max(map(len, times.values()))
    columns = ["", "operation", *(readable(size) for size in sizes), "MB/s", "over the limit"]
    report = Report("comm", f"One call between 2 ranks, in us; {rounds} rounds", columns)
    for kind, operation in dict.fromkeys((kind, operation) for kind, operation, _ in times):
        own = [statistics.median(times[kind, operation, size]) for size in sizes]
        cells = [f"{1e6 * seconds:.1f}" for seconds in own] + [f"{sizes[-1] / own[-1] / 1e6:.0f}"]
        report.rows.append([kind, operation, *cells, over_limit(times, kind, operation, sizes)])
    report.rows += [
        ["lockstep", f"decode step, {label}", *[""] * (len(sizes) + 1), f"{1e6 * seconds:.0f} us"]
        for label, seconds in step_s.items()
    ]
    report.notes = [
        "tcp, mpi4py and zmq are the limits: sockets, MPI itself, and encrypted messages as in the control "
        "channel. Over the limit: for the smallest and the largest size.",
        "between computations: what a sum adds to a chain of 16 multiplications of 0.8 ms, as in tensor "
        "parallel. Lockstep exchanges small parts over ring whole, and sums them on every rank.",
        "decode step: one token of a model with next to no computation, through scheduler, control channel, "
        "data plane and sampling, and back.",
    ]
    report.data["times_s"] = {f"{k}, {o}, {s}": values for (k, o, s), values in times.items()}
    report.data["step_s"] = dict(step_s)
    report.plot = lambda figure: draw(figure, times, sizes)
    return report


def over_limit(times: Times, kind: str, operation: str, sizes: Sequence[int]) -> str:
    if kind not in LIMITS:
        return ""
    named = operation.partition(" ")[0]
    ratios = []
    for size in (sizes[0], sizes[-1]):
        limit = times.get((LIMITS[kind], named, size)) or times[LIMITS[kind], "send/recv", size]
        ratios.append(f"{statistics.median(times[kind, operation, size]) / statistics.median(limit):.1f} x")
    return ", ".join(ratios)


def readable(size: int) -> str:
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def draw(figure: Any, times: Times, sizes: Sequence[int]) -> None:
    axes = figure.subplots()
    for kind, operation in dict.fromkeys((kind, operation) for kind, operation, _ in times):
        own = [1e6 * statistics.median(times[kind, operation, size]) for size in sizes]
        style = "--" if kind in (*LIMITS.values(), "zmq") else "-"
        axes.plot(sizes, own, f"o{style}", label=f"{kind}: {operation}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes")
    axes.set_ylabel("us per call (dashed: limits)")
    axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main())
