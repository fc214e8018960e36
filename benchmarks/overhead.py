"""Where a step's time goes: on rank 0, on another rank, and in the front process.

Runs `lockstep serve` on 2 ranks with clocks around the parts of a step (programs/profiled.py; the product has
none), with as many clients as the batch has rows. Figures are CPU time of the part's thread per step, so that
they mean the same on a busy machine; only waiting is given by the clock on the wall. The clocks' own cost is
measured, too, and not counted.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import models
from common.processes import BenchmarkError, pinned_python
from common.report import Bar, Report, parser, publish
from common.servers import PROGRAMS, Server, ours
from lockstep.bench.load import Lengths, asks, closed_loop

COMPUTING = ("build forward", "hand to device", "wait for device")
"""Parts of a rank that are the forward pass, or waiting for it."""
OTHERS = "device and other threads"
CLOCKS = "reading these clocks"
WAITING = ("hand to device", "wait for device", "receive", "poll the front")
ROWS = 8
"""In each micro-batch, of which a pipeline has one per rank."""


def main() -> int:
    options = parser(__doc__, minutes=4)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--backend", default="ring")
    options.add_argument("--parallel", default="pipeline", choices=("pipeline", "tensor"))
    chosen = options.parse_args()
    began_s = time.monotonic()
    clients = ROWS * (chosen.ranks if chosen.parallel == "pipeline" else 1)
    tokens, rounds = (24, 1) if chosen.quick else (64, 5)
    model = models.folder(models.QUICK if chosen.quick else models.FULL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BENCH_PROFILE"] = folder
        python = pinned_python(Path(folder), PROGRAMS / "profiled.py")
        contestant = ours(model, python, chosen.ranks, chosen.backend, chosen.parallel)
        with Server(contestant) as server:
            server.wait_until_ready()
            measured = [
                profile_round(server, Path(folder), clients, tokens, number) for number in range(rounds)
            ]
    return publish(
        make_report(measured, f"{contestant.label}, {clients} clients, {model.name}"), chosen, began_s
    )


def profile_round(
    server: Server, folder: Path, clients: int, tokens: int, number: int
) -> dict[str, dict[str, Any]]:
    """What each process of the server measured during one load."""
    profiles(server, folder)
    work = asks(clients, Lengths(32, 32), Lengths(tokens, tokens), seed=number)
    run = closed_loop(server.contestant.endpoint, work, clients)
    if run.errors:
        raise BenchmarkError(f"{run.errors[0]}\n{server.tail()}")
    found = profiles(server, folder)
    found["client"] = {"cpu_s": run.client_cpu_s, "wall_s": run.wall_s, "tokens": clients * tokens}
    return found


def profiles(server: Server, folder: Path) -> dict[str, dict[str, Any]]:
    """Make every profiled process write its figures, which also sets them to nothing; returns them."""
    for file in folder.glob("*.json"):
        file.unlink()
    mine = [p for p in server.tree() if "profiled.py" in " ".join(p.cmdline()[:3])]
    for process in mine:
        process.send_signal(signal.SIGUSR1)
    deadline_s = time.monotonic() + 10
    while len(files := list(folder.glob("*.json"))) < len(mine):
        if time.monotonic() > deadline_s:
            raise BenchmarkError(
                f"{len(files)} of {len(mine)} processes wrote their profile\n{server.tail()}"
            )
        time.sleep(0.05)
    records = [json.loads(file.read_text()) for file in files]
    return {name(record): record for record in records if name(record)}


def name(record: dict[str, Any]) -> str:
    if record["module"] == "lockstep.server.front":
        return "front"
    return f"rank {record['rank']}" if record["module"] == "lockstep" else ""


def make_report(rounds: Sequence[dict[str, dict[str, Any]]], what: str) -> Report:
    columns = ["process", "part", "CPU per step", "on the wall"]
    report = Report("overhead", f"Where a step's time goes: {what}", columns)
    for who in shown(rounds):
        for part, figures in parts(rounds, who).items():
            waits = f"{1e3 * figures['wait_s']:.3f} ms" if figures["wait_s"] else ""
            report.rows.append([who, part, f"{1e3 * figures['cpu_s']:.3f} ms", waits])
    own = {who: overhead_s(rounds, who) for who in shown(rounds) if who != "front"}
    report.bars = [
        Bar(f"{who}: all but forward and communication", 1e3 * own[who], 1.0, True, "ms/step") for who in own
    ]
    tokens = [r["client"]["tokens"] for r in rounds]
    front = [sum(r["front"]["threads_s"].values()) / t for r, t in zip(rounds, tokens, strict=True)]
    client = [r["client"]["cpu_s"] / t for r, t in zip(rounds, tokens, strict=True)]
    wall = [r["client"]["wall_s"] / steps(r, "rank 0") for r in rounds]
    report.notes += [
        f"A step took {1e3 * statistics.median(wall):.2f} ms on the wall. CPU per token: front process "
        f"{1e3 * statistics.median(front):.3f} ms, load generator {1e3 * statistics.median(client):.3f} ms.",
        *(f"Not measured, because it is not there: {m}" for m in sorted(missing(rounds))),
    ]
    report.data["parts"] = {who: parts(rounds, who) for who in shown(rounds)}
    report.data["rounds"] = list(rounds)
    report.plot = lambda figure: draw(figure, rounds)
    return report


def shown(rounds: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    return sorted((who for who in rounds[0] if who != "client"), key=lambda who: (who == "front", who))


def steps(found: dict[str, dict[str, Any]], who: str) -> int:
    """Steps with a forward pass that this process has executed; the front's are those of rank 0."""
    return max(found["rank 0" if who == "front" else who]["calls"].get("Executor.start", 0), 1)


def parts(rounds: Sequence[dict[str, dict[str, Any]]], who: str) -> dict[str, dict[str, float]]:
    """Per step, the median over the rounds; "rest of the main thread" is what no part accounts for.

    What the clocks themselves cost, as each process has measured it at its start, is a part of its own.
    """
    names = list(dict.fromkeys(part for found in rounds for part in found[who]["cpu_s"]))
    table = {}
    for part in names:
        cpu = [found[who]["cpu_s"].get(part, 0.0) / steps(found, who) for found in rounds]
        wall = [found[who]["wall_s"].get(part, 0.0) / steps(found, who) for found in rounds]
        wait_s = statistics.median(wall) if part in WAITING else 0.0
        table[part] = {"cpu_s": statistics.median(cpu), "wait_s": wait_s}
    clocks = [
        found[who]["clock_s"] * sum(found[who]["calls"].values()) / steps(found, who) for found in rounds
    ]
    rest = [
        (found[who]["threads_s"]["main"] - sum(found[who]["cpu_s"].values())) / steps(found, who) - clock_s
        for found, clock_s in zip(rounds, clocks, strict=True)
    ]
    table["rest of the main thread"] = {"cpu_s": statistics.median(rest), "wait_s": 0.0}
    table[CLOCKS] = {"cpu_s": statistics.median(clocks), "wait_s": 0.0}
    for thread in sorted({thread for found in rounds for thread in found[who]["threads_s"]} - {"main"}):
        spent = [found[who]["threads_s"].get(thread, 0.0) / steps(found, who) for found in rounds]
        if statistics.median(spent) > 1e-6:
            kind = f"thread {thread}" if thread.startswith("ZMQ") else OTHERS
            table[kind] = {"cpu_s": statistics.median(spent), "wait_s": 0.0}
    return table


def overhead_s(rounds: Sequence[dict[str, dict[str, Any]]], who: str) -> float:
    """The main thread's time per step less the forward pass, and the control channel's threads."""
    table = parts(rounds, who)
    counted = [
        f["cpu_s"]
        for p, f in table.items()
        if p not in (*COMPUTING, OTHERS, CLOCKS) and not p.startswith("thread")
    ]
    sockets = [f["cpu_s"] for p, f in table.items() if p.startswith("thread ZMQ")]
    return sum(counted) + sum(sockets)


def missing(rounds: Sequence[dict[str, dict[str, Any]]]) -> set[str]:
    return {part for found in rounds for record in found.values() for part in record.get("missing", [])}


def draw(figure: Any, rounds: Sequence[dict[str, dict[str, Any]]]) -> None:
    axes = figure.subplots()
    for place, who in enumerate(shown(rounds)):
        left = 0.0
        for part, figures in parts(rounds, who).items():
            if part in (*COMPUTING, OTHERS, CLOCKS) or figures["cpu_s"] < 1e-6:
                continue
            width = 1e3 * figures["cpu_s"]
            axes.barh(place, width, left=left, edgecolor="white")
            if width > 0.03:
                axes.text(left + width / 2, place, part, ha="center", va="center", fontsize=6, rotation=90)
            left += width
    axes.set_yticks(range(len(shown(rounds))), shown(rounds))
    axes.axvline(1.0, color="black", linestyle=":")
    axes.set_xlabel("ms of CPU per step, without the forward pass")


if __name__ == "__main__":
    sys.exit(main())
