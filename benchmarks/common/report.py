"""What a benchmark says: a table, its bars, one line of JSON, and its section of README.md."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import machine

FOLDER = Path(__file__).resolve().parents[1]
PASS, SHORT, NOT_RUN = "pass", "short", "not run"


@dataclass(frozen=True)
class Bar:
    """What has to be reached: `value` at least (or at most) `limit`. NaN: it was not measured."""

    what: str
    value: float
    limit: float
    at_most: bool = False
    unit: str = "x"
    why_not: str = ""

    @property
    def verdict(self) -> str:
        if math.isnan(self.value):
            return NOT_RUN
        return PASS if (self.value <= self.limit if self.at_most else self.value >= self.limit) else SHORT

    @property
    def bound(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g} {self.unit}"

    @property
    def reached(self) -> str:
        return self.why_not or "-" if math.isnan(self.value) else f"{self.value:.3g} {self.unit}"


@dataclass
class Report:
    """Figures of one run of one benchmark. `rows` are shown; `data` is for machines."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    plot: Callable[[Any], None] | None = None
    """Draws on a matplotlib figure."""


def parser(doc: str | None, minutes: float) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `minutes` is how long a full run may take.

    A benchmark that is told to end (SIGTERM) ends the servers and ranks that it started, too.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options = argparse.ArgumentParser(description=(doc or "").strip().split("\n")[0])
    options.add_argument("--quick", action="store_true", help="less than a minute, on a small model")
    options.add_argument("--minutes", type=float, default=minutes, help=f"time budget (default {minutes:g})")
    options.add_argument("--output", type=Path, help="folder for the JSON line and the plots")
    options.add_argument(
        "--write-readme", action="store_true", help="refresh this section of benchmarks/README.md"
    )
    options.add_argument("--strict", action="store_true", help="exit with status 1 when a bar is not reached")
    return options


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of rounds that ran side by side; NaN where one side is missing."""
    pairs = [a / b for a, b in zip(over, under, strict=False) if b]
    return statistics.median(pairs) if pairs else math.nan


def publish(report: Report, options: argparse.Namespace, began_s: float) -> int:
    """Print, and write what was asked for. Returns the exit status."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_table(report.title, report.columns, report.rows))
    if report.bars:
        console.print(_table("Bars", BAR_COLUMNS, _bar_rows(report.bars)))
    for note in report.notes:
        console.print(note, markup=False)
    record = {
        "benchmark": report.name,
        "quick": options.quick,
        "commit": machine.commit(),
        "command": command(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "seconds": round(time.monotonic() - began_s, 1),
        "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in report.bars],
        "notes": report.notes,
        **report.data,
    }
    folder = options.output or (FOLDER / "results" if options.write_readme else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{report.name}.json").write_text(_line(record) + "\n")
        _draw(report, folder)
    if options.write_readme:
        _write_section(report, record)
    print(_line(record), flush=True)
    return int(options.strict and any(bar.verdict == SHORT for bar in report.bars))


def command() -> str:
    """As it was typed, from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(machine.ROOT) if script.is_relative_to(machine.ROOT) else script
    arguments = [argument for argument in sys.argv[1:] if argument != "--write-readme"]
    return shlex.join(["python", str(shown), *arguments])


BAR_COLUMNS = ("bar", "wanted", "reached", "")


def _bar_rows(bars: Sequence[Bar]) -> list[Sequence[str]]:
    return [(bar.what, bar.bound, bar.reached, bar.verdict) for bar in bars]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _draw(report: Report, folder: Path) -> None:
    if report.plot is None:
        return
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('no plot: matplotlib is missing (pip install "mlx-lockstep[bench]")', file=sys.stderr)
        return
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = report.name
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    report.plot(figure)
    figure.savefig(folder / f"{report.name}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{report.name}.png", dpi=120)


def _write_section(report: Report, record: dict[str, Any]) -> None:
    """Put this run between its markers in README.md, or at the end where it has none yet."""
    begin, end = f"<!-- {report.name}: begin -->", f"<!-- {report.name}: end -->"
    section = "\n".join([begin, *_markdown(report, record), end])
    file = FOLDER / "README.md"
    text = file.read_text() if file.exists() else "# Benchmarks\n"
    if begin in text and end in text:
        before, rest = text.split(begin, 1)
        text = before + section + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    file.write_text(text)


def _markdown(report: Report, record: dict[str, Any]) -> list[str]:
    place = record["machine"]
    where = (
        f"{place['processor']}, {place['cores']} cores, commit {record['commit']}, {record['seconds']:.0f} s"
    )
    lines = [f"### {report.title}", "", f"`{record['command']}` ({where})", ""]
    lines += _markdown_table(report.columns, report.rows)
    if report.bars:
        lines += ["", *_markdown_table(BAR_COLUMNS, _bar_rows(report.bars))]
    for note in report.notes:
        lines += ["", note]
    if report.plot is not None:
        lines += ["", f"![{report.title}](results/{report.name}.svg)"]
    return lines


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *["---:"] * (len(columns) - 1)]
    return ["| " + " | ".join(map(str, row)) + " |" for row in (columns, aligned, *rows)]
