from __future__ import annotations

import json
import math
import sys

import pytest

from common import report
from common.report import Bar, Report, parser, publish, ratio


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        (Bar("", 1.8, 1.8), "pass"),
        (Bar("", 1.79, 1.8), "short"),
        (Bar("", 1.0, 1.0, at_most=True), "pass"),
        (Bar("", 1.01, 1.0, at_most=True), "short"),
        (Bar("", math.nan, 1.0), "not run"),
    ],
)
def test_a_bar_says_whether_it_was_reached(bar, verdict):
    assert bar.verdict == verdict


def test_ratios_compare_the_rounds_that_ran_side_by_side():
    # The machine was twice as slow in the second round: the ratio is the same.
    assert ratio([20.0, 10.0], [10.0, 5.0]) == 2
    assert math.isnan(ratio([], [1.0]))


@pytest.fixture
def published(tmp_path, monkeypatch, capsys):
    """Publish a small report; returns its exit status, its JSON line and README.md."""
    monkeypatch.setattr(report, "FOLDER", tmp_path)

    def run(*arguments: str, value: float = 2.0):
        monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", *arguments])
        made = Report("x", "A title", ["name", "value"], [["one", "1"]], [Bar("a bar", value, 1.5)])
        made.data["nothing"] = math.nan
        made.plot = lambda figure: figure.subplots().plot([1, 2])
        status = publish(made, parser("Doc.", 1).parse_args(), 0.0)
        readme = tmp_path / "README.md"
        line = capsys.readouterr().out.strip().splitlines()[-1]
        return status, json.loads(line), readme.read_text() if readme.exists() else ""

    return run


def test_the_last_line_is_json_for_machines(published):
    _, record, _ = published("--quick")
    assert record["command"] == "python benchmarks/x.py --quick"
    assert record["nothing"] is None
    assert record["bars"][0]["verdict"] == "pass"
    assert {"machine", "versions", "commit"} <= set(record)


def test_a_missed_bar_fails_only_a_strict_run(published):
    assert published(value=1.0)[0] == 0
    assert published("--strict", value=1.0)[0] == 1


def test_a_section_of_the_readme_is_replaced_and_the_rest_stays(published, tmp_path):
    _, _, first = published("--write-readme")
    assert "| one | 1 |" in first
    (tmp_path / "README.md").write_text("before\n" + first.split("\n", 1)[1] + "\nafter\n")
    _, _, second = published("--write-readme", value=9.0)
    assert second.startswith("before\n")
    assert second.endswith("\nafter\n")
    assert second.count("<!-- x: begin -->") == 1
    assert "9 x" in second and "2 x" not in second


def test_plots_are_drawn_in_both_formats(published, tmp_path):
    pytest.importorskip("matplotlib")
    published("--output", str(tmp_path / "out"))
    assert (tmp_path / "out" / "x.svg").read_text().startswith("<?xml")
    assert (tmp_path / "out" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_line_instead_of_a_plot(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, _ = published("--output", str(tmp_path / "out"))
    assert status == 0
    assert not (tmp_path / "out" / "x.svg").exists()
