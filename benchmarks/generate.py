"""Prefill and decode tokens/s on 1 rank and on several, in a pipeline and in tensor parallel.

The engine alone, without HTTP: the benchmark speaks to rank 0 over the link of the front process. Each rank
has one core and one BLAS thread. Beside ours, mlx-lm's own model code in a bare loop, alone and with its own
distributed forms, but for weights that stay in 4 bits. Interleaved; ratios are medians of the rounds' own
ratios: of all rounds, and of those in which each rank had its own path to memory (common/memory.py), as
machines have: these are waited for. What the machine can give at most is shown by ranks that do the same at
once without a word between them.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import machine, models
from common.engine import Copies, Engine, Loop, Timing
from common.memory import Memory, is_own
from common.processes import Program, environment, pinned_python
from common.report import Bar, Report, parser, publish, ratio
from common.servers import PROGRAMS, start_ranks

BATCH = 8

PATIENCE_S = 4.0
"""For each measurement of several ranks."""


@dataclass(frozen=True)
class Work:
    """What is generated: one sequence with a long prompt, and a batch with short ones."""

    prompt: int
    tokens: int
    batch_prompt: int = 16


@dataclass(frozen=True)
class Case:
    """A model, what is generated with it, and how it is cut. `memory_gb`: what each rank may use."""

    name: str
    shape: models.Shape
    work: Work
    forms: Sequence[str] = ("tensor",)
    memory_gb: float | None = None


@dataclass(frozen=True)
class Turn:
    """One form in one round: what was measured, and the memory that the cores could read before and after."""

    timing: Timing
    memory: float


@dataclass
class Line:
    """The rounds of one form."""

    label: str
    ranks: int
    single: list[Turn] = field(default_factory=list)
    batch: list[Turn] = field(default_factory=list)

    def figures(self, kind: str) -> list[float]:
        """Of each round."""
        if kind == "token":
            return [turn.timing.token_s for turn in self.single]
        if kind == "batch":
            return [turn.timing.decode_tokens_per_s for turn in self.batch]
        return [getattr(turn.timing, f"{kind}_tokens_per_s") for turn in self.single]

    def had_memory(self, kind: str) -> list[bool]:
        """For each round, whether each rank had its own path to memory."""
        turns = self.batch if kind == "batch" else self.single
        return [is_own(turn.memory, self.ranks) for turn in turns]


FULL = Case("generate", models.FULL, Work(512, 32), ("pipeline", "tensor"))
WIDE = Case("generate-wide", models.WIDE, Work(512, 32))
FOUR_BIT = Case("generate-four-bit", models.FOUR_BIT, Work(16, 12, batch_prompt=1), memory_gb=1.5)
LLAMA_8B = dataclasses.replace(FOUR_BIT, name="generate-llama-8b", shape=models.LLAMA_8B)


def main() -> int:
    options = parser(__doc__, minutes=8)
    options.add_argument("--ranks", help="besides 1; up to as many as there are cores, by commas")
    options.set_defaults(case=FULL)
    kinds = options.add_mutually_exclusive_group()
    for option, case, what in (
        ("--wide", WIDE, "two wide layers, not 16 narrow ones"),
        ("--four-bit", FOUR_BIT, "16 wide ones that fit in memory in 4 bits only"),
        ("--llama-8b", LLAMA_8B, "three layers of Llama 8B, in 4 bits likewise"),
    ):
        kinds.add_argument(
            option, dest="case", action="store_const", const=case, help=f"{what}; no pipelines"
        )
    options.add_argument("--no-peers", action="store_true", help="only ours")
    chosen = options.parse_args()
    began_s = time.monotonic()
    case = chosen.case
    if chosen.quick and case.memory_gb:
        case = dataclasses.replace(case, work=Work(16, 6))
    elif chosen.quick:
        case = dataclasses.replace(case, shape=models.QUICK, work=Work(128, 12))
    ranks = [int(n) for n in (chosen.ranks or f"{min(2, len(machine.cores()))}").split(",")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pythons = [pinned_python(Path(folder), core=rank) for rank in range(max(ranks))]
        backends = ("ring",) if chosen.quick else ("ring", "mpi")
        peers = not chosen.no_peers and case.memory_gb is None
        starters = contestants(case, pythons, Path(folder), ranks, backends, peers)
        lines, running = {}, {}
        for key, (number, start) in starters.items():
            contestant = stack.enter_context(start())
            contestant.wait_until_ready()
            contestant.generate(1, 8, 3)
            contestant.quieten()
            running[key] = contestant
            lines[key] = Line(contestant.label, number)
        memory = stack.enter_context(Memory(max(ranks)))
        compete(
            running, lines, case.work, memory, began_s + (1 if chosen.quick else 60 * chosen.minutes - 15)
        )
    return publish(make_report(case, lines), chosen, began_s)


def contestants(
    case: Case,
    pythons: Sequence[Path],
    folder: Path,
    ranks: Sequence[int],
    backends: Sequence[str],
    peers: bool,
) -> dict[str, Any]:
    """By name, the number of ranks and how to start it. Each of `pythons` has its rank 0 on another core."""
    model = models.folder(case.shape)
    limits = {"LOCKSTEP_MEMORY_GB": f"{case.memory_gb}"} if case.memory_gb else {}

    def start(label: str, python: Path, number: int, backend: str, *form: str) -> Engine:
        serve = ["-m", "lockstep", "serve", "--model", str(model), *form]
        argv = start_ranks(python, backend, number, serve)
        return Engine(label, folder, lambda env: Program(argv, {**environment(), **limits, **env}))

    def alone(label: str, python: Path) -> Engine:
        return start(label, python, 1, "ring")

    def copies(number: int) -> Copies:
        label = f"{number} times 1 rank at once"
        return Copies(label, [partial(alone, label, python) for python in pythons[:number]])

    def engine(number: int, backend: str, parallel: str) -> Any:
        label = f"lockstep, {number} ranks {parallel}, {backend}"
        return number, lambda: start(label, pythons[0], number, backend, "--parallel", parallel)

    def loop(number: int, backend: str, form: str) -> Any:
        label = "mlx-lm loop, 1 rank" if number == 1 else f"mlx-lm loop, {number} ranks {form}, {backend}"
        program = [str(PROGRAMS / "bare_loop.py"), str(model), *([form] if number > 1 else [])]
        argv = [str(pythons[0]), *program]
        argv = start_ranks(pythons[0], backend, number, program) if number > 1 else argv
        return number, lambda: Loop(label, Program(argv, stdin=True))

    found: dict[str, Any] = {"one": (1, lambda: alone("lockstep, 1 rank", pythons[0]))}
    for number in ranks:
        found[f"copies {number}"] = (number, partial(copies, number))
        for backend in backends:
            for parallel in case.forms:
                found[f"{parallel} {number} {backend}"] = engine(number, backend, parallel)
    if peers:
        found["bare"] = loop(1, "ring", "")
        for form in case.forms if "mpi" in backends else ():
            found[f"bare {form}"] = loop(ranks[0], "mpi", form)
    return found


def compete(
    running: dict[str, Any], lines: dict[str, Line], work: Work, memory: Memory, deadline_s: float
) -> None:
    """Rounds until the time is up, at least one."""
    number, took_s = 0, 0.0
    while number == 0 or time.monotonic() + took_s < deadline_s:
        began_s = time.monotonic()
        keys = list(running)
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            contestant, line = running[key], lines[key]
            contestant.wake()
            for turns, rows, prompt in (
                (line.single, 1, work.prompt),
                (line.batch, BATCH, work.batch_prompt),
            ):
                before = memory.awaited(line.ranks, PATIENCE_S)
                timing = contestant.generate(rows, prompt, work.tokens)
                turns.append(Turn(timing, min(before, memory.given())))
            contestant.quieten()
        number, took_s = number + 1, time.monotonic() - began_s


def make_report(case: Case, lines: dict[str, Line]) -> Report:
    work = case.work
    rounds = len(lines["one"].single)
    what = f"prompt {work.prompt}, {work.tokens} tokens; batch of {BATCH}"
    limit = f", {case.memory_gb} GB of memory each" if case.memory_gb else ""
    title = f"Generating: {what}; {case.shape.name}{limit}, {rounds} rounds"
    columns = [
        "form",
        "prefill tok/s",
        "decode tok/s",
        "ms/token",
        "over 1 rank",
        "own memory",
        "batch tok/s",
        "over 1 rank",
        "own memory",
    ]
    report = Report(case.name, title, [*columns, "efficiency"])
    one = lines["one"]
    for line in lines.values():
        decode = ratio(line.figures("decode"), one.figures("decode"))
        batch = ratio(line.figures("batch"), one.figures("batch"))
        row = [line.label, f"{middle(line, 'prefill'):.1f}", f"{middle(line, 'decode'):.1f}"]
        row += [
            f"{1e3 * middle(line, 'token'):.1f}",
            f"{decode:.2f} x",
            with_rounds(*with_own_memory(line, one, "decode")),
        ]
        row += [
            f"{middle(line, 'batch'):.1f}",
            f"{batch:.2f} x",
            with_rounds(*with_own_memory(line, one, "batch")),
        ]
        report.rows.append([*row, f"{100 * max(decode, batch) / line.ranks:.0f}%"])
    report.bars = bars(lines)
    for key, line in lines.items():
        if key.startswith("pipeline"):
            extra_s = statistics.median(
                a - b for a, b in zip(line.figures("token"), one.figures("token"), strict=True)
            )
            report.notes.append(f"{line.label}: {1e3 * extra_s:+.2f} ms per token over the stages' compute.")
    for key, line in lines.items():
        if key.startswith("tensor"):
            report.notes.append(of_limit(line, lines[f"copies {line.ranks}"]))
    report.data["rounds"] = {
        line.label: {kind: line.figures(kind) for kind in ("prefill", "decode", "batch")}
        | {f"memory, {kind}": [turn.memory for turn in getattr(line, kind)] for kind in ("single", "batch")}
        for line in lines.values()
    }
    report.notes.append("Own memory: in the rounds (how many) in which each rank had its own path to memory.")
    report.plot = lambda figure: draw(figure, lines)
    return report


def of_limit(line: Line, copies: Line) -> str:
    """How much of what as many ranks decode that need not wait for each other."""
    one, batch = (ratio(line.figures(kind), copies.figures(kind)) for kind in ("decode", "batch"))
    return f"{line.label}: {one:.2f} of {copies.label}, {batch:.2f} in a batch."


def middle(line: Line, kind: str) -> float:
    return statistics.median(line.figures(kind))


def with_own_memory(line: Line, one: Line, kind: str) -> tuple[float, int]:
    """The ratio of the rounds in which each rank had its own path to memory, and how many they were."""
    rounds = zip(line.figures(kind), one.figures(kind), line.had_memory(kind), strict=True)
    pairs = [(figure, alone) for figure, alone, had_memory in rounds if had_memory]
    return ratio([figure for figure, _ in pairs], [alone for _, alone in pairs]), len(pairs)


def with_rounds(value: float, rounds: int) -> str:
    return f"{value:.2f} x ({rounds})" if rounds else "-"


def bars(lines: dict[str, Line]) -> list[Bar]:
    """Issue 2's of one request in a pipeline, issue 3's of tensor parallel."""

    def bar(what: str, key: str, kind: str, limit: float) -> list[Bar]:
        if key not in lines:
            return []
        line, one = lines[key], lines["one"]
        value, rounds = with_own_memory(line, one, kind)
        own_memory = f"{what}, {rounds} of {len(line.single)} rounds with own memory"
        return [
            Bar(what, ratio(line.figures(kind), one.figures(kind)), limit),
            Bar(own_memory, value, limit),
        ]

    slower = []
    if "pipeline 2 ring" in lines:
        value = ratio(lines["pipeline 2 ring"].figures("token"), lines["one"].figures("token"))
        what = "pipeline, ring, 2 ranks: time per token of one request over 1 rank"
        slower = [Bar(what, value, 1.15, True)]
    return [
        *slower,
        *bar("tensor, mpi, 2 ranks over 1: one request", "tensor 2 mpi", "decode", 1.5),
        *bar("tensor, mpi, 2 ranks over 1: batch of 8", "tensor 2 mpi", "batch", 1.75),
        *bar("tensor, ring, 2 ranks over 1: one request", "tensor 2 ring", "decode", 1.4),
        *bar("tensor, ring, 2 ranks over 1: batch of 8", "tensor 2 ring", "batch", 1.6),
        *bar("pipeline, ring, 2 ranks over 1: batch of 8", "pipeline 2 ring", "batch", 1.8),
    ]


def draw(figure: Any, lines: dict[str, Line]) -> None:
    shown = list(reversed(lines.values()))
    titles = {
        "prefill": "prefill tokens/s",
        "decode": "decode tokens/s, 1 request",
        "batch": f"batch of {BATCH}",
    }
    for axes, (kind, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        colours = ["tab:blue" if line.label.startswith("lockstep") else "tab:gray" for line in shown]
        axes.barh([line.label for line in shown], [middle(line, kind) for line in shown], color=colours)
        axes.set_xlabel(title)


if __name__ == "__main__":
    sys.exit(main())
