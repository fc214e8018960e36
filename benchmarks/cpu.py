"""What our changes for CPUs are worth on one core: mlx-lm's model, and each change on top of the last.

The model computes in float32 with the same BLAS and one thread in every form; see src/lockstep/model/cpu. The
last forms are what a rank does with too little memory for weights in float32: they stay as they are stored.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import models
from common.processes import Program, environment, pinned_python
from common.report import Report, parser, publish, ratio
from common.servers import PROGRAMS

ROWS = (1, 4, 7, 8, 32)


def main() -> int:
    chosen = parser(__doc__, minutes=3).parse_args()
    began_s = time.monotonic()
    shape = models.QUICK if chosen.quick else models.FULL
    prompt, rows = (64, ROWS[:2]) if chosen.quick else (512, ROWS)
    budget_s = 1.0 if chosen.quick else 60 * chosen.minutes - 40
    with tempfile.TemporaryDirectory() as folder:
        python = pinned_python(Path(folder))
        argv = [str(python), str(PROGRAMS / "cpu_steps.py"), str(models.folder(shape))]
        argv += [str(budget_s), str(prompt), *map(str, rows)]
        with Program(argv, environment(), stdin=True) as program:
            measured = json.loads(program.listen(budget_s + 240))
    return publish(make_report(measured["times_s"], shape.name, measured["blas"]), chosen, began_s)


def make_report(times: dict[str, dict[str, list[float]]], model: str, blas: str) -> Report:
    plain = times["mlx-lm"]
    report = Report("cpu", f"Milliseconds on one core, and times faster; {model}, {blas}", ["form", *plain])
    for form, cases in times.items():
        cells = [
            f"{1e3 * statistics.median(cases[case]):.1f} ({ratio(plain[case], cases[case]):.2f} x)"
            if case in cases
            else ""
            for case in plain
        ]
        report.rows.append([form, *cells])
    report.notes.append("Decode: milliseconds of one step of all rows, which have different lengths.")
    report.notes.append("Experts: of so many tokens with 4 of 16 experts each, three matrices of 768 x 2048.")
    report.data |= {"times_s": times, "blas": blas}
    report.plot = lambda figure: draw(figure, times)
    return report


def draw(figure: Any, times: dict[str, dict[str, list[float]]]) -> None:
    axes = figure.subplots()
    plain, width = times["mlx-lm"], 0.8 / len(times)
    for number, (form, cases) in enumerate(times.items()):
        places = [place + width * number for place, case in enumerate(plain) if case in cases]
        axes.bar(places, [ratio(plain[case], cases[case]) for case in cases], width=0.9 * width, label=form)
    axes.set_xticks([place + 0.4 for place in range(len(plain))], list(plain))
    axes.set_ylabel("times as fast as mlx-lm")
    axes.legend()


if __name__ == "__main__":
    sys.exit(main())
